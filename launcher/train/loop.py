"""The order of things in one stage. Imports nothing heavy; everything comes in as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from launcher.plan.schedule import Schedule

if TYPE_CHECKING:
    from launcher.data.feed import StepBatch


class Result(Protocol):
    """What a step tells the loop."""

    save_wanted: bool


class Trainer(Protocol):
    """What the loop needs of an engine."""

    def step(self, batch: StepBatch, lr: float, *, save_wanted: bool = False) -> Result: ...


def run(
    *,
    start: int,
    schedule: Schedule,
    batch_of: Callable[[int], StepBatch],
    engine: Trainer,
    clock_wants_save: Callable[[], bool],
    record: Callable[[StepBatch, Result], None],
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Train from after step `start` to the end of the schedule."""
    for step in range(start + 1, schedule.num_steps + 1):
        batch = batch_of(step)
        result = engine.step(batch, schedule.lr(step), save_wanted=clock_wants_save())
        record(batch, result)
        if schedule.eval_due(step):
            evaluate(step)
        if schedule.save_due(step, wanted=result.save_wanted):
            save(step)
