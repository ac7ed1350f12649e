"""The report of a run while it goes on: written anew, so that others see that its driver lives."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import ending, listing, run
from launcher.errors import TrainingFailed
from launcher.report.history import Life
from launcher.report.view import View
from tests.report.events import begin, step


def report(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / ending.REPORT).read_text())
    return found


def wait_until(holds: Any) -> None:
    until_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_a_report_lives_as_its_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "WRITE_EVERY_S", 0.1)
    (tmp_path / listing.RECIPE).touch()
    end = ending.Ending(tmp_path, {}, print)
    assert listing.look(tmp_path, tmp_path.parent).state == "running"
    life = Life(2, time.time())
    end.lives.append(life)
    life.events += [begin(), step(1), {"kind": "failure", "time": 1002.0, "reason": "gone", "ranks": [1]}]
    wait_until(lambda: len(report(tmp_path)["events"]) == 2)
    first = report(tmp_path)
    assert [event["kind"] for event in first["events"]] == ["start", "failure"]
    wait_until(lambda: report(tmp_path)["seconds"] > first["seconds"])
    assert report(tmp_path)["verdict"]["kind"] == "running"

    end.failed(TrainingFailed("the workers could not go on"))
    ended = (tmp_path / ending.REPORT).read_text()
    assert report(tmp_path)["verdict"]["kind"] == "bug"
    time.sleep(0.5)
    assert (tmp_path / ending.REPORT).read_text() == ended, "nothing is written over a verdict"
    assert listing.look(tmp_path, tmp_path.parent).state == "failed"


def test_what_fails_beside_the_training_ends_with_a_verdict_too(tmp_path: Path) -> None:
    class Closed(View):
        def show(self, event: dict[str, Any]) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    end = ending.Ending(tmp_path, {}, print)
    job = SimpleNamespace(run_dir=tmp_path, recipe=None)
    with pytest.raises(BrokenPipeError) as ended:
        run._driven(job, None, Closed(), None, end, None)
    assert "verdict: " in ended.value.__notes__[0]
    assert report(tmp_path)["verdict"]["kind"] != "running" and report(tmp_path)["ended"]


def test_steps_of_joint_stages_count_once(tmp_path: Path) -> None:
    recipe = "stages: [{name: source}, {name: target}]\ntransfer: joint\n"
    (tmp_path / listing.RECIPE).write_text(recipe)
    end = ending.Ending(tmp_path, {}, print)
    assert "3 steps, " in end.done({"stages": {"source": {"steps": 3}, "target": {"steps": 3}}})
