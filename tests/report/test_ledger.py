import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.report import curves, past
from launcher.report.curves import Record
from launcher.report.ledger import LINES, Ledger, Try, ledger
from tests.report.directories import T0, Clock, killed_run, write


def _close(book: Ledger, **seconds: float) -> None:
    """Check every line: those not named hold nothing."""
    found = {kind: round(each, 3) for kind, each in book.seconds.items() if round(each, 3)}
    assert found == seconds
    assert sum(book.seconds.values()) == pytest.approx(book.whole_s)


def test_every_second_of_a_run_that_lost_a_worker_has_its_line(tmp_path: Path, monkeypatch: Any) -> None:
    told = past.read(killed_run(tmp_path / "run", monkeypatch))
    _close(
        told.ledger,
        startup=15.0,  # 12 until the first stage, and 3 that the first step took beyond a usual one
        steps=18.0,  # 20 steps of 1 s, 0.1 s of each for data; those two first ones that count
        data=2.0,
        lost=3.0,  # 6, 7 and 8, trained before the worker was lost
        restart=9.0,
        checkpoint=0.75,
        evaluation=6.0,
        export=7.0,
    )
    assert told.ledger.whole_s == pytest.approx(60.75)
    assert dict(told.ledger.startup) == pytest.approx(
        {
            "joining the cluster": 3.0,
            "preparing the data": 4.0,
            "starting workers": 3.0,
            "starting workers and building the model": 2.0,
            "the first step, beyond a usual one": 3.0,
        }
    )
    assert told.ledger.goodput == pytest.approx(18 / 60.75)
    assert told.record.step[told.ledger.is_lost].tolist() == [6, 7, 8]


def test_of_a_driver_that_was_killed_what_was_not_saved_is_lost_by_the_next_try(
    tmp_path: Path, monkeypatch: Any
) -> None:
    clock = Clock(tmp_path / "metrics.jsonl", monkeypatch)
    clock.wait(5)
    clock.begin("chat", 0, 10)
    clock.steps("chat", 1, 4, data_s=0.0)
    clock.checkpoint("chat", 2)
    before = past.read(tmp_path)
    assert before.ledger.is_unsaved.tolist() == [False, False, True, True]
    killed_s = clock.now_s
    clock.wait(1000)
    begun_s = clock.now_s
    clock.wait(5)
    clock.begin("chat", 2, 10)
    clock.steps("chat", 3, 5, data_s=0.0)
    first = {"begun": T0, "ended": killed_s, "kind": "driver lost"}
    report = {
        "verdict": {"kind": "stopped by the user"},
        "begun": begun_s,
        "ended": clock.now_s + 1,
        "events": [],
    }
    write(tmp_path, "report.json", report | {"earlier": [first]})
    book = past.read(tmp_path).ledger
    # Nothing is held between tries: the 1000 s are no part of the whole.
    _close(book, startup=10.0, steps=2.0, lost=2.0, unsaved=3.0, end=1.0)
    assert book.whole_s == pytest.approx(18.0)


def test_more_workers_weigh_more(tmp_path: Path, monkeypatch: Any) -> None:
    clock = Clock(tmp_path / "metrics.jsonl", monkeypatch)
    clock.begin("chat", 0, 4, workers=1)
    clock.steps("chat", 1, 2, data_s=0.0)
    clock.checkpoint("chat", 2)
    clock.wait(2)
    clock.begin("chat", 2, 4, workers=3)
    clock.steps("chat", 3, 4, data_s=0.0)
    record = curves.read(tmp_path / "metrics.jsonl")
    book = ledger(record, [Try(begun_s=T0, ended_s=clock.now_s, kind="done")], ["chat"])
    assert book.worker_s["steps"] == pytest.approx(2 * 1 + 2 * 3)
    assert book.worker_s["restart"] == pytest.approx(2 * 1)
    assert book.goodput == pytest.approx(8 / 10)


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["step", "step", "step", "stage_begin", "eval", "checkpoint", "export", "skipped", "after"]
        ),
        st.floats(-5, 50),  # Clocks are set back now and then.
        st.floats(0, 20),
        st.integers(1, 9),
        st.sampled_from(["source", "target"]),
    ),
    max_size=40,
)


@given(_EVENTS, st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_record_says_the_lines_add_up_to_the_whole(
    tmp_path: Path, events: list[Any], tries: list[tuple[float, float]]
) -> None:
    now_s, lines = T0, []
    for kind, passed_s, step_s, step, stage in events:
        now_s += passed_s
        told = {
            "kind": kind,
            "time": now_s,
            "stage": stage,
            "step": step,
            "step_s": step_s,
            "data_s": step_s / 2,
        }
        lines.append(told | {"start": step - 1, "num_workers": step, "num_steps": 9, "metrics": {}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    at_s, held = T0, []
    for gap_s, lasted_s in tries:
        held.append(
            Try(begun_s=at_s + gap_s, ended_s=at_s + gap_s + lasted_s, kind="done", startup={"one": 3.0})
        )
        at_s += gap_s + lasted_s
    book = ledger(curves.read(tmp_path / "metrics.jsonl"), held)
    assert set(book.seconds) <= set(LINES)
    assert all(seconds >= -1e-6 for seconds in book.seconds.values())
    assert sum(book.seconds.values()) == pytest.approx(sum(lasted for _, lasted in tries), abs=1e-3)
    assert sum(book.startup.values()) == pytest.approx(book.seconds["startup"], abs=1e-3)


def test_a_run_without_a_record_has_a_ledger_too() -> None:
    book = ledger(Record(), [Try(begun_s=T0, ended_s=T0 + 7, kind="bug")])
    assert dict(book.seconds) == {"startup": 7.0}
