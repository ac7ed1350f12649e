"""What is known of a run, out of its events: times, shares and rates as arithmetic."""

import pytest

from launcher.report.progress import Next, Progress
from tests.report.events import BEGIN_S, begin, run, step


def taken(*events: dict) -> Progress:
    progress = Progress()
    for event in events:
        progress.take(event)
    return progress


def test_rates_shares_and_the_time_that_is_left() -> None:
    stages = [{"name": "source", "num_steps": 100, "forecast_s": 0.5}]
    stages += [{"name": "target", "num_steps": 10, "forecast_s": 1.0}, {"name": "baseline", "num_steps": 10}]
    progress = taken(run(*stages), begin(), *[step(n) for n in range(1, 41)])
    assert progress.per_second("tokens") == 100
    assert progress.padding() == pytest.approx(0.2)
    assert progress.data_share() == pytest.approx(0.01)
    assert progress.stage_left_s() == 60
    # A step of target takes twice as long by its forecast; of baseline nothing is known.
    assert progress.run_left_s() == 60 + 10 * 2 + 10 * 1
    assert progress.mfu() is None


def test_mfu_is_of_all_workers_peaks() -> None:
    progress = taken(begin(flops_per_token=6e9, peak_flops=1e12), step(1))
    assert progress.mfu() == pytest.approx(6e9 * 100 / (1e12 * 2))
    assert taken(begin(flops_per_token=6e9), step(1)).mfu() is None
    assert taken(begin(flops_per_token=6e9, peak_flops=None), step(1)).mfu() is None


@pytest.mark.parametrize(
    ("save", "saved", "expected"),
    [
        ({"save_steps": 25, "save_minutes": None}, None, Next(50, 10.0)),
        ({"save_steps": 200, "save_minutes": None}, None, Next(100, 60.0)),
        # The clock comes sooner than the stage's end, and begins with the stage or with the last checkpoint.
        ({"save_steps": None, "save_minutes": 1.0}, None, Next(None, 20.0)),
        ({"save_steps": None, "save_minutes": 1.0}, 30, Next(None, 50.0)),
        ({"save_steps": None, "save_minutes": 15.0}, None, Next(100, 60.0)),
    ],
)
def test_the_next_checkpoint(save: dict, saved: int | None, expected: Next) -> None:
    progress = taken(run(**save), begin(), *[step(n) for n in range(1, 41)])
    if saved is not None:
        told = {"kind": "checkpoint", "time": BEGIN_S + saved, "stage": "source", "step": saved}
        progress.take(told | {"bytes": 1, "stall_s": 0.5, "save_s": 1.0})
        assert progress.checkpoint_share() == pytest.approx(0.5 / 40.5)
    assert progress.next_checkpoint(BEGIN_S + 40) == expected


def test_steps_that_are_trained_again_take_the_place_of_those_before() -> None:
    progress = taken(begin(), *[step(n) for n in range(1, 31)])
    progress.take({"kind": "failure", "time": BEGIN_S + 31, "reason": "gone"})
    assert progress.is_broken and progress.restarts == 1
    progress.take(begin(start=20, time=BEGIN_S + 50))
    assert not progress.is_broken and progress.step == 20 and not progress.losses
    progress.take(step(21, time=BEGIN_S + 60))
    progress.take(step(22, time=BEGIN_S + 61))
    assert progress.step == 22
    assert progress.per_step_s() == 1.0, "the time before the restart does not count"


def test_what_a_usage_says_holds_for_all_steps_before_it() -> None:
    progress = taken(begin(), step(10), step(20))
    spent = {"tokens": 2000, "slots": 4000, "data_s": 10.0, "step_s": 20.0, "stall_s": 5.0}
    memory = {"device": None, "host": 7}
    progress.take({"kind": "usage", "time": BEGIN_S + 20, "memory": memory, "spent": spent})
    assert progress.padding() == 0.5 and progress.data_share() == 0.5
    assert progress.checkpoint_share() == pytest.approx(0.2)
    progress.take(step(21))
    assert progress.spent["tokens"] == 2100
    assert spent["tokens"] == 2000, "the event stays as it is"


def test_stages_come_and_go() -> None:
    progress = taken(run({"name": "source"}, {"name": "target"}), begin(), step(100))
    told = {"kind": "eval", "time": BEGIN_S + 101, "stage": "source", "step": 100, "metrics": {"f1": 0.5}}
    progress.take(told)
    progress.take({"kind": "export", "time": BEGIN_S + 102, "stage": "source", "path": "export"})
    assert progress.stages["source"].is_done and progress.stages["source"].metrics == {"f1": 0.5}
    progress.take(begin("target", num_steps=7))
    assert progress.stages["target"].num_steps == 7
    copy = progress.copy()
    progress.take(step(1, "target"))
    assert copy.step == 0 and not copy.losses and progress.step == 1


def test_a_record_without_a_begin_has_no_time_that_is_left() -> None:
    progress = Progress()
    for number in (1, 2, 3):
        progress.take(step(number))
    assert progress.step == 3 and progress.run_left_s() is None
