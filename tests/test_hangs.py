"""Whether workers hang and who keeps the others waiting: heartbeats and a clock, as tables."""

import timeit

import pytest

from launcher import hangs
from launcher.hangs import LIMITS_S, LONGEST_S, Hang, Watch
from launcher.processes import Process, Seen
from launcher.pulse import Beat, Board, Phase, Place, Pulse


class Workers:
    """Two or more workers that beat every second, on a clock that the test turns."""

    def __init__(self, num_workers: int = 2, hang_minutes: float | None = None, sent: int | None = None):
        self.watch = Watch(num_workers, hang_minutes)
        self.now_s, self.number = 0.0, 0
        self.places = {
            rank: Place(1, "a", 0, "load") for rank in range(num_workers if sent is None else sent)
        }
        self.silent: dict[int, Beat] = {}

    def beats(self) -> dict[int, Beat]:
        return {
            rank: self.silent.get(rank, Beat(rank, f"host{rank}", "n", Process(rank, 1), self.number, place))
            for rank, place in self.places.items()
        }

    def go(self, step: int, phase: Phase = "step", *, rank: int | None = None, tick: int = 0) -> None:
        for each in self.places if rank is None else [rank]:
            self.places[each] = Place(1, "a", step, phase, tick)

    def wait(self, seconds: float, every_s: float = 1.0) -> Hang | None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += every_s
            self.number += 1
            if (found := self.watch.look(self.now_s, self.beats())) is not None:
                return found
        return None

    def stop(self, rank: int) -> None:
        self.silent[rank] = self.beats()[rank]

    def train(self, steps: int, step_s: float = 1.0) -> None:
        for step in range(1, steps + 1):
            self.go(step)
            assert self.wait(step_s) is None


@pytest.mark.parametrize(
    ("step_s", "limit_s"), [(0.2, 120), (1, 120), (10, 200), (100, 2000), (1000, LONGEST_S)]
)
def test_a_step_may_last_a_multiple_of_the_usual_one(step_s: float, limit_s: float) -> None:
    workers = Workers()
    workers.train(6 if step_s >= 1 else 40, step_s)
    assert workers.wait(limit_s - step_s - 2) is None
    found = workers.wait(step_s + 5)
    assert found is not None
    assert found.limit_s == pytest.approx(limit_s, rel=0.01)


def test_the_first_steps_have_a_limit_of_their_own_also_after_a_restart() -> None:
    workers = Workers()
    workers.train(2)
    assert workers.wait(LIMITS_S["step"] - 2) is None
    assert workers.wait(5) is not None
    workers = Workers()
    workers.train(9)
    workers.watch.look(workers.now_s, {})
    workers.go(5)
    assert workers.wait(LIMITS_S["step"] - 2) is None


@pytest.mark.parametrize("phase", sorted(set(LIMITS_S) - {"step"}))
def test_other_phases_have_limits_of_their_own(phase: Phase) -> None:
    workers = Workers()
    workers.train(9)
    workers.go(9, phase)
    assert workers.wait(LIMITS_S[phase] - 2) is None
    assert workers.wait(5) is not None


def test_one_rank_in_a_long_phase_keeps_all_of_them() -> None:
    workers = Workers()
    workers.train(9)
    workers.go(9, "save", rank=0)
    assert workers.wait(1000) is None
    workers.go(10, rank=0)
    assert workers.wait(110) is None
    assert workers.wait(20) is not None


def test_batches_of_an_evaluation_are_progress() -> None:
    workers = Workers()
    for tick in range(5):
        workers.go(3, "evaluate", tick=tick)
        assert workers.wait(LIMITS_S["evaluate"] - 10) is None


def test_a_recipe_gives_steps_a_limit_and_makes_no_other_shorter() -> None:
    workers = Workers(hang_minutes=0.1)
    assert workers.wait(1000) is None
    workers.train(9)
    assert workers.wait(4) is None
    assert workers.wait(4) is not None
    longer = Workers(hang_minutes=600)
    longer.go(1, "save")
    assert longer.wait(20_000, every_s=2) is None
    assert hangs.collective_timeout_s(600) > 600 * 60


def test_a_collective_never_ends_before_a_limit_is_reached() -> None:
    assert hangs.collective_timeout_s(None) > max(LONGEST_S, hangs.SILENT_S)


def test_time_that_nobody_looks_at_does_not_count() -> None:
    workers = Workers()
    workers.train(9)
    workers.now_s += 100_000  # The driver was stopped.
    assert workers.wait(50) is None


def test_workers_that_are_done_are_not_watched() -> None:
    workers = Workers()
    workers.train(9)
    workers.go(9, "done")
    assert workers.wait(9000, every_s=3) is None


def test_silence_has_a_limit_in_every_phase() -> None:
    workers = Workers()
    workers.go(0, "load")
    workers.stop(1)
    found = workers.wait(1000)
    assert found is not None and found.idle_s < 905


def hang_of(workers: Workers) -> Hang:
    found = workers.wait(4000)
    assert found is not None
    return found


def trained() -> Workers:
    workers = Workers(3, hang_minutes=1.25)
    workers.train(120)
    return workers


COLLECTIVE = (
    'Thread 1 (most recent call first):\n  File "x/torch/distributed/c10d.py", line 1 in all_reduce\n'
)
OWN = 'Thread 1 (most recent call first):\n  File "x/model.py", line 1 in forward\n'


def test_who_is_behind_a_stopped_process() -> None:
    workers = trained()
    workers.stop(1)
    text = hangs.message(hang_of(workers), {1: Seen("its process is stopped", ""), 0: Seen("", COLLECTIVE)})
    assert text == (
        "no step for 76 s: rank 1 on host1 has sent no heartbeat for 76 s: its process is stopped, last in step 120"
        " of stage a; the others wait in step 120"
    )


def test_who_is_behind_a_node_that_does_not_answer() -> None:
    workers = trained()
    workers.stop(2)
    text = hangs.message(hang_of(workers), {0: Seen("", COLLECTIVE), 1: Seen("", COLLECTIVE)})
    assert "rank 2 on host2 has sent no heartbeat for 76 s, last in step 120 of stage a; the others" in text


def test_who_is_behind_one_that_still_waits_for_data() -> None:
    workers = trained()
    workers.go(121)
    workers.go(121, "data", rank=0)
    text = hangs.message(hang_of(workers), {})
    assert (
        "rank 0 on host0 is behind, in phase data at step 121 of stage a; the others wait in step 121" in text
    )


def test_who_is_behind_one_that_is_in_no_collective() -> None:
    seen = {0: Seen("", COLLECTIVE), 1: Seen("", COLLECTIVE), 2: Seen("", OWN)}
    found = hang_of(trained())
    text = hangs.message(found, seen)
    assert "rank 2 on host2 is in no collective, in step 120 of stage a; the others wait in step 120" in text
    assert "all ranks are in step 120 of stage a" in hangs.message(found, {})
    assert "all ranks are in step 120 of stage a" in hangs.message(
        found, dict.fromkeys(range(3), Seen("", OWN))
    )
    kept = hangs.report(found, text, seen)
    assert kept.startswith(text) and OWN.strip() in kept and "--- rank 1" in kept


def test_who_is_behind_one_that_never_came() -> None:
    workers = Workers(2, sent=1)
    workers.go(1)
    text = hangs.message(hang_of(workers), {})
    assert "rank 1 has sent no heartbeat at all; the others wait in step 1" in text


def test_late_heartbeats_of_workers_that_failed_are_none() -> None:
    board, old = Board(), Workers().beats()[0]
    new = Beat(0, "host0", "n", Process(9, 2), 1, Place(0, "", 0, "begin"))
    board.beat(old)
    assert board.failed() is None
    board.beat(old)
    assert board.beats() == {}
    board.beat(new)
    board.found("told", "a", 3)
    board.beat(new)
    assert board.beats() == {}
    assert board.failed() == ("told", "a", 3)
    assert board.failed() is None


def test_entering_a_phase_costs_a_step_nothing() -> None:
    pulse, times = Pulse(), 200_000

    def loop() -> None:
        for step in range(times):
            # What training does in every step.
            pulse.step, pulse.phase = step, "data"
            pulse.phase = "step"

    per_step_ns = min(timeit.repeat(loop, number=1, repeat=5)) / times * 1e9
    print(f"{per_step_ns:.0f} ns a step")
    assert per_step_ns < 2000
