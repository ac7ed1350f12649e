"""Numbers gone wrong: found before the update, by all ranks alike, and what is done about the step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from launcher.errors import NumbersError
from launcher.train.step import NO_WISHES, Wishes

if TYPE_CHECKING:
    from launcher.data.feed import StepBatch
    from launcher.train.engine import Engine
    from launcher.train.step import StepResult

OnNan = Literal["stop", "skip", "rollback"]
WINDOW, FEWEST, LEAST_SHARE = 100, 20, 0.01
"""Losses that a spike is judged by: at most, at least; and the least deviation, as a share of their mean."""
MOST_IN_A_ROW = 10
"""Steps that may be skipped one after another: when more go wrong, it is not the batches."""
PASSED = "passed by: it went wrong before"


@dataclass(slots=True)
class Rule:
    """Says what is wrong with a step. The same on every rank, since it sees what has been summed over all.

    Attributes:
        spike: deviations above the mean at which a loss is one; None: never.
        losses: the last good ones.
    """

    spike: float | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def fault(self, loss: float, norm: float, *, heals: bool = False) -> str:
        """Return what is wrong, in words; empty if nothing is.

        Args:
            loss: of the global batch.
            norm: of the whole gradient.
            heals: whether a gradient that overflows is no fault, but lowers the loss scale.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not heals:
            return f"the gradient's norm is {norm}"
        if self.spike is None or len(self.losses) < FEWEST:
            return ""
        mean = fmean(self.losses)
        deviation = max(pstdev(self.losses, mean), LEAST_SHARE * abs(mean))
        if loss <= mean + self.spike * deviation:
            return ""
        return (
            f"the loss is {loss:.4g}, {(loss - mean) / deviation:.1f} deviations above the mean {mean:.4g} of"
            f" {len(self.losses)} steps (spike: {self.spike:g})"
        )


class Guard:
    """An engine whose bad steps change nothing: it skips them, or ends the stage."""

    def __init__(
        self,
        engine: Engine,
        *,
        stage: str,
        names: list[str],
        on_nan: OnNan,
        spike: float | None,
        passed: Set[int],
        write: Callable[[dict[str, Any]], None],
        before_error: Callable[[int], None],
    ) -> None:
        """Remember the settings.

        Args:
            engine: makes the steps.
            stage: its name, for what is said.
            names: of the parts, in the order of their batches.
            on_nan: what to do about a bad step.
            spike: see `Rule`.
            passed: steps that went wrong before and are not made again.
            write: is given, on every rank, what is known of a bad step.
            before_error: is called, on every rank, with a bad step that ends the stage.
        """
        self.engine, self.stage, self.names = engine, stage, names
        self.write, self.before_error = write, before_error
        self.on_nan, self.passed, self.rule = on_nan, passed, Rule(spike)
        self.num_in_a_row = 0

    def step(self, batches: tuple[StepBatch, ...], lr: float, wishes: Wishes = NO_WISHES) -> StepResult:
        """Make a step, or skip it; every rank does the same.

        Raises:
            NumbersError: it went wrong, and is not to be skipped.
        """
        step = batches[-1].step
        if step in self.passed:
            return self.engine.passed_by(batches, PASSED, wishes)
        result = self.engine.step(batches, lr, wishes, fault=self.rule.fault)
        if not result.fault:
            self.num_in_a_row = 0
            self.rule.losses.append(result.loss)
            return result
        self.num_in_a_row += 1
        is_enough = self.num_in_a_row > MOST_IN_A_ROW
        self.write(self._told(batches, result))
        if self.on_nan == "skip" and not is_enough:
            return result
        self.before_error(step)
        raise NumbersError(self._message(step, result.fault, is_enough), self.stage, step)

    def _told(self, batches: tuple[StepBatch, ...], result: StepResult) -> dict[str, Any]:
        """What is known of a bad step; the ranks put their samples together, which costs time only here."""
        mine: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        for i, (name, batch) in enumerate(zip(self.names, batches, strict=True)):
            ids = [[int(each) for each in micro_batch.samples] for micro_batch in batch.micro_batches]
            bad = [j for j, losses in enumerate(result.micro_losses) if not math.isfinite(losses[i])]
            mine[0][name] = [each for micro_batch in ids for each in micro_batch]
            mine[1][name] = [each for j in bad for each in ids[j]]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        samples, suspects = (
            {name: sorted({each for rank in every for each in rank[k][name]}) for name in self.names}
            for k in (0, 1)
        )
        return {
            "stage": self.stage,
            "step": batches[-1].step,
            "fault": result.fault,
            "loss": plain(result.loss),
            "gradient_norm": plain(result.gradient_norm),
            "samples": samples,
            "suspects": suspects,
        }

    def _message(self, step: int, fault: str, is_enough: bool) -> str:
        said = f"stage {self.stage}, step {step}: {fault}; the weights are as they were before it, and the ids of its"
        said += " samples are in bad_batches.jsonl: "
        if is_enough:
            return f"{said}{MOST_IN_A_ROW} steps before it were skipped too, so it is not the batch: lower learning_rate"
        if self.on_nan == "rollback":
            return f"{said}mend the data, or lower learning_rate"
        return f"{said}mend them or lower learning_rate; on_nan: skip goes on without such batches"


def plain(number: float) -> float | str:
    """Return a number as JSON can hold it."""
    return number if math.isfinite(number) else str(number)
