"""The end of a record, read from its back: whatever its size, cut lines, steps twice."""

import json
import os
import time
from pathlib import Path

from launcher.report import tail
from launcher.report.tail import Tail
from tests.report.events import BEGIN_S, begin, step


def write(path: Path, *events: dict, end: str = "") -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + end)


def usage(number: int) -> dict:
    told = begin()
    begun = {key: told[key] for key in told if key not in ("kind", "time", "stage")}
    spent = {"tokens": 7, "slots": 9, "data_s": 0.5, "step_s": float(number), "stall_s": 0.0}
    known = {"stage": "source", "step": number, "metrics": {"source": {"f1": 0.5}}, "begun": begun}
    memory = {"device": None, "host": 1}
    return {"kind": "usage", "time": BEGIN_S + number, **known, "spent": spent, "memory": memory}


def test_a_short_record_is_read_from_the_last_begin(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert Tail(path).last() == [] and Tail(path).new() == []
    write(path, begin(), step(1), step(2), begin(start=1), step(2), end='{"kind": "step", "ti')
    found = Tail(path)
    assert found.last() == [begin(start=1), step(2)]
    assert found.new() == []
    write(path, end='me": 1}\n')
    assert found.new() == [{"kind": "step", "time": 1}]
    write(path, end="\x00 no JSON\n[1]\n")
    write(path, step(3))
    assert found.new() == [step(3)]
    # The run was begun anew: its record is another file.
    os.replace(path, tmp_path / "old")
    assert found.new() == []
    write(path, step(1))
    assert found.new() == [step(1)]


def test_of_a_long_record_the_end_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    many = [step(n) for n in range(1, 3001)]
    write(path, begin(), *many[:1500], usage(1500), *many[1500:])
    assert path.stat().st_size > 2 * tail.TAIL_BYTES
    events = Tail(path).last()
    first, evaluated, told = events[:3]
    assert first == begin(time=BEGIN_S), "the usage knows what the begin said, and how long it is ago"
    assert evaluated["metrics"] == {"f1": 0.5} and told["kind"] == "usage"
    assert events[-1] == many[-1] and len(events) < 2000


def test_without_a_usage_the_begin_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, begin("earlier"), begin(), *(step(n) for n in range(1, 3001)))
    events = Tail(path).last()
    assert events[0] == begin() and events[-1] == step(3000) and len(events) < 2000


def test_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, begin())
    with open(path, "r+b") as file:
        file.truncate(4 << 30)  # A hole: it takes no disk.
    write(path, *(step(n) for n in range(1, 10)), usage(9), end="\n")
    started_s = time.monotonic()
    found = Tail(path)
    assert [event["kind"] for event in found.last()][:2] == ["stage_begin", "eval"]
    assert found.new() == []
    assert time.monotonic() - started_s < 1
