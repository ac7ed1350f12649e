"""What a generation of workers keeps of the events that it hears, and what becomes of those that cannot be shown."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launcher.generation import Generation
from launcher.report.view import View
from tests.report.events import begin, step


class _Closed(View):
    """A view whose terminal is gone."""

    def show(self, event: dict[str, Any]) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def generation(run_dir: Path) -> Generation:
    # Without its actor, which only Ray can make.
    found = Generation.__new__(Generation)
    found.events, found.view = [], _Closed()
    found.group = SimpleNamespace(run_dir=run_dir)  # type: ignore[assignment]
    return found


def test_of_steps_in_a_row_two_are_kept_though_usage_comes_between(tmp_path: Path) -> None:
    heard = generation(tmp_path)
    heard._take(begin())
    for number in range(1, 101):
        heard._take(step(number))
        if number % 10 == 0:
            heard._take({"kind": "usage", "time": 1.0, "memory": {}, "spent": {}})
    assert [(event["kind"], event.get("step")) for event in heard.events] == [
        ("stage_begin", None),
        ("step", 1),
        ("step", 100),
    ]


def test_a_failure_is_in_the_record_though_it_cannot_be_shown(tmp_path: Path) -> None:
    heard = generation(tmp_path)
    failure = {"kind": "failure", "time": 1.0, "said": {"0": "lost"}}
    heard._take(failure)
    assert heard.events == [failure]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["kind"] == "failure"
