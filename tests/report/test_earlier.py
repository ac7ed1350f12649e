"""What report.json keeps of the tries before."""

from pathlib import Path
from typing import Any

import pytest

from launcher import storage
from launcher.ending import MOST_EVENTS, Ending
from launcher.errors import TrainingFailed
from launcher.report import past
from launcher.report.history import Life
from launcher.report.startup import Marks


def _try(run_dir: Path, number: int) -> dict[str, Any]:
    """Begin and fail once."""
    end = Ending(run_dir, {}, lambda _: None, Marks(begun_s=1.0 + number, ended={"one": 2.0 + number}))
    events: list[dict[str, Any]] = [{"kind": "worker", "time": 1.0, "rank": 0, "host": "node-7"}]
    events += [{"kind": "checkpoint", "time": 2.0, "stage": "a", "step": i} for i in range(300)]
    events += [{"kind": "failure", "time": 3.0, "reason": f"reason {number}", "ranks": [1]}] * 150
    end.lives.append(Life(num_workers=2, begun_s=1.0, events=events, ended_s=4.0))
    end.failed(TrainingFailed("no more"))
    found: dict[str, Any] = storage.read_json(run_dir / "report.json")
    return found


def test_earlier_tries_keep_what_happened_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.ending.MOST_TRIES", 2)
    for number in range(5):
        report = _try(tmp_path, number)
    earlier = report["earlier"]
    assert len(earlier) == 4
    assert [bool(each.get("events")) for each in earlier] == [False, False, True, True]
    assert len(earlier[-1]["events"]) == MOST_EVENTS
    assert {event["kind"] for event in earlier[-1]["events"]} == {"failure"}
    assert earlier[-1]["startup"]["begun"] == 4.0
    assert report["environment"]["hosts"] == {"0": "node-7"}
    assert report["environment"]["versions"]["python"] and "pytest" in report["environment"]["command"]


def test_a_failed_run_has_its_page_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = Ending(tmp_path, {}, lambda _: None)
    error = end.failed(TrainingFailed("no more"))
    assert f"report: {tmp_path / 'report.html'}" in "\n".join(error.__notes__)
    assert "Bug (exit code 4)" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(past, "read", lambda _: 1 / 0)
    error = Ending(tmp_path, {}, lambda _: None).failed(TrainingFailed("no more"))
    assert "report:" not in "\n".join(error.__notes__)
    assert "verdict:" in "\n".join(error.__notes__)
