"""The order of things in one stage. Imports nothing heavy; everything comes in as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from launcher.plan.schedule import Schedule
from launcher.train.step import Wishes


class Result(Protocol):
    """What a step tells the loop."""

    @property
    def wishes(self) -> Wishes: ...


class Trainer(Protocol):
    """What the loop needs of an engine."""

    def step(self, batch: Any, lr: float, wishes: Wishes) -> Result: ...


def run(
    *,
    start: int,
    schedule: Schedule,
    batch_of: Callable[[int], Any],
    engine: Trainer,
    wishes: Callable[[], Wishes],
    record: Callable[[Any, Result], None],
    evaluate: Callable[[int], bool],
    save: Callable[[int], None],
    leave: Callable[[int], None],
    collect: Callable[[int], None],
) -> None:
    """Train from after step `start` to the end of the schedule, or until `evaluate` says that it is enough.

    `leave` raises where the workers are to go before the end.
    """
    for step in range(start + 1, schedule.num_steps + 1):
        batch = batch_of(step)
        result = engine.step(batch, schedule.lr(step), wishes())
        record(batch, result)
        collect(step)
        is_enough = schedule.eval_due(step) and evaluate(step)
        if schedule.save_due(step, wanted=result.wishes.save or result.wishes.leave or is_enough):
            save(step)
        if result.wishes.leave:
            leave(step)
        if is_enough:
            break
