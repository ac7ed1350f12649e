"""A start, taken apart."""

from launcher.report.history import Life
from launcher.report.startup import Marks, parts, told


def test_parts_follow_each_other_up_to_the_first_step() -> None:
    marks = Marks(100.0, {"reading": 101.0, "joining": 103.5})
    life = Life(2, 104.0)
    life.events += [{"kind": "worker", "time": 108.0}, {"kind": "worker", "time": 108.5}]
    life.events += [{"kind": "stage_begin", "time": 111.0}, {"kind": "step", "time": 111.25}]
    # Workers that were started once more, and the stage's last step, are not of the start.
    life.events += [{"kind": "worker", "time": 150.0}, {"kind": "step", "time": 160.0}]
    assert parts(marks, [life]) == {
        "reading": 1.0,
        "joining": 2.5,
        "starting workers": 5.0,
        "building the model and engine": 2.5,
        "the first step": 0.25,
    }
    assert told(marks, [])["begun"] == 100.0


def test_a_start_that_came_to_nothing() -> None:
    life = Life(1, 2.0)
    life.events.append({"kind": "worker", "time": 3.0})
    assert parts(Marks(0.0, {"reading": 1.0}), [life]) == {"reading": 1.0, "starting workers": 2.0}
    assert parts(Marks(0.0, {"reading": 1.0}), []) == {"reading": 1.0}
