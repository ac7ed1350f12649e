"""Events of the record to what a tracker takes: numbers at a step of a stage, and remarks. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from launcher.report.history import BREAKS
from launcher.report.record import Event


@dataclass(frozen=True, slots=True)
class Point:
    """Numbers at a step.

    Attributes:
        values: by name: `loss`, `tokens_per_s`, `eval/accuracy`, …
        remark: what happened there, in words; mostly empty.
    """

    stage: str
    step: int
    time_s: float
    values: dict[str, float]
    remark: str = ""


_REMARKS = {
    "stage_begin": "{num_workers} workers begin after step {start} of {num_steps}",
    "failure": "a worker failed: {reason}",
    "halved": "{reason}; half the micro-batch from here on",
    "hang": "{message}",
    "hung": "workers that hung were ended",
    "rolled_back": "{reason}; back to the last checkpoint, and past step {step}",
    "skipped": "step {step} skipped: {fault}",
    "left": "saved and left at step {step}: {reason}",
    "stopped": "{type}: {message}",
    "export": "model written to {path}",
}
"""What is told in words."""


@dataclass(slots=True)
class Telling:
    """Decides what of a record a tracker is told, each thing once.

    Step n is the same whoever trains it, so what was told of it before a failure holds: a step that is trained
    again is not told again, and every tracker's steps rise.

    Attributes:
        every_steps: of the steps, tell one in so many, and a stage's first and last.
        told: by stage and kind, the last step that was told.
        num_steps: by stage.
        uses: by stage, what a token a second is of all workers' peak.
        num_failures: so far.
        stage: the one that the record is in.
    """

    every_steps: int = 1
    told: dict[str, int] = field(default_factory=dict)
    num_steps: dict[str, int] = field(default_factory=dict)
    uses: dict[str, float] = field(default_factory=dict)
    num_failures: int = 0
    stage: str = ""

    def state(self) -> dict[str, Any]:
        """Return what a later `Telling` goes on from, as plain data."""
        kept = ("told", "num_steps", "uses", "num_failures", "stage")
        return {name: getattr(self, name) for name in kept}

    def points(self, events: list[Event]) -> Iterator[Point]:
        """Yield what is to be told of events."""
        for event in events:
            if (point := self._point(event)) is not None:
                yield point

    def _point(self, event: Event) -> Point | None:
        kind = event["kind"]
        stage = event.get("stage") or self.stage
        # Stages that train jointly are evaluated each under its own name: training goes on in the one it was in.
        if kind in ("stage_begin", "step"):
            self.stage = stage
        if kind == "stage_begin":
            self.num_steps[stage] = event["num_steps"]
            self.uses[stage] = use_of_a_token(event)
        if kind in BREAKS:
            self.num_failures += 1
        if kind in _VALUES:
            step = event["step"] if "step" in event else self._step(stage)
            place = f"{stage}/{kind}"
            if step <= self.told.get(place, -1):
                return None
            self.told[place] = step
            if kind == "step" and not self._is_due(step):
                return None
            values = _finite(_VALUES[kind](event))
            if kind == "step" and (use := self.uses.get(stage)):
                values["mfu"] = use * values["tokens_per_s"]
            return Point(stage, step, event["time"], values)
        if kind in _REMARKS:
            values = {"failures": float(self.num_failures)} if kind in BREAKS else {}
            if kind == "stage_begin":
                values["workers"] = float(event["num_workers"])
            remark = _REMARKS[kind].format_map(_Known(event))
            return Point(stage, self._step(stage), event["time"], values, remark)
        return None

    def _step(self, stage: str) -> int:
        return max(0, self.told.get(f"{stage}/step", 0))

    def _is_due(self, step: int) -> bool:
        return step == 1 or step == self.num_steps.get(self.stage) or step % self.every_steps == 0


class _Known(dict[str, Any]):
    """An event of any version: what it does not hold stands as a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"


def _of_step(event: Event) -> dict[str, Any]:
    step_s = max(event["step_s"], 1e-6)
    values = {name: event.get(name) for name in ("loss", "lr", "gradient_norm", "epoch", "step_s")}
    values |= {f"loss/{part}": loss for part, loss in event.get("losses", {}).items()}
    return values | {
        "tokens_per_s": event["tokens"] / step_s,
        "samples_per_s": event["samples"] / step_s,
        "padding": 1 - event["tokens"] / max(1, event["slots"]),
        "data_wait": event["data_s"] / step_s,
    }


def _of_checkpoint(event: Event) -> dict[str, Any]:
    return {f"checkpoint/{name}": event.get(name) for name in ("bytes", "stall_s", "save_s")}


_VALUES = {
    "step": _of_step,
    "eval": lambda event: {f"eval/{name}": value for name, value in event["metrics"].items()},
    "after": lambda event: {f"again/{name}": value for name, value in event["metrics"].items()},
    "checkpoint": _of_checkpoint,
}
"""What is told in numbers."""


def use_of_a_token(event: Event) -> float:
    """Return what one token a second is of the peak of all workers, by a stage's begin: the model's FLOPs over what
    they could do in large products of matrices (MFU, of a token a second). 0 where it is not known."""
    peak = (event.get("peak_flops") or 0.0) * event["num_workers"]
    return (event.get("flops_per_token") or 0.0) / peak if peak else 0.0


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """Those that a chart can show."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return a tree's leaves by their paths (`stages.source.epochs`); items of a list by their names, or numbers."""
    if isinstance(tree, dict):
        named = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        named = [(item.get("name", i) if isinstance(item, dict) else i, item) for i, item in enumerate(tree)]
    else:
        return {path: tree}
    found: dict[str, Any] = {}
    for name, item in named:
        found |= flat(item, f"{path}.{name}" if path else str(name))
    return found


def final(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a run's summary, by their paths: `stages.target.metrics.accuracy`."""
    return _finite({name: value for name, value in flat(summary).items() if not isinstance(value, bool)})
