"""The record of a run in columns, and curves thin enough to draw. A million steps take seconds. Pure but for the reading."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.report.record import Event, parsed

Floats = NDArray[np.float64]
CHUNK = 20_000
POINTS = 500
"""Of one curve on the page."""


@dataclass(slots=True)
class Record:
    """The record in columns.

    Attributes:
        stages: their names, as they came.
        stage: of each step, its number in `stages`.
        step: of each step, its number in the stage. A step that was trained again is there twice.
        columns: every number that steps tell, NaN where one does not.
        events: all other events, in order.
        places: of each event, how many steps stand before it.
    """

    stages: list[str] = field(default_factory=list)
    stage: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    step: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, Floats] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def time(self) -> Floats:
        """When each step was made; clocks that were set back stand still."""
        return np.maximum.accumulate(self.columns.get("time", np.zeros(len(self.step))))

    def column(self, name: str) -> Floats:
        """Return a column; NaN for every step that has none."""
        return self.columns.get(name, np.full(len(self.step), np.nan))


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve thinned to few points: in each bucket the mean, and what it ranged over.

    Attributes:
        x: the last place of each bucket.
        y, low, high: its mean, least and most.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats


def read(path: Path) -> Record:
    """Return a run's record; an empty one where there is no file. Lines that are not whole are left out."""
    stages: dict[str, int] = {}
    found, pieces = Record(), list[dict[str, Floats]]()
    num_steps = 0
    try:
        file = open(path, encoding="utf-8", errors="replace")
    except OSError:
        return found
    with file:
        while lines := list(islice(file, CHUNK)):
            steps: list[Event] = []
            for event in _events(lines):
                if event["kind"] == "step":
                    steps.append(event)
                else:
                    found.events.append(event)
                    found.places.append(num_steps + len(steps))
            num_steps += len(steps)
            if steps:
                pieces.append(_columns(steps, stages))
    names = {name for piece in pieces for name in piece}
    whole = {name: np.concatenate([_of(piece, name) for piece in pieces]) for name in names}
    if pieces:
        found.stage, found.step = whole.pop("stage").astype(np.int64), whole.pop("step").astype(np.int64)
    found.columns, found.stages = whole, list(stages)
    return found


def thinned(x: Floats, y: Floats, points: int = POINTS) -> Curve:
    """Return a curve of at most so many points, whatever the number of values; those that are no numbers are left out."""
    is_sound = np.isfinite(y)
    x, y = x[is_sound], y[is_sound]
    if len(x) == 0:
        return Curve(x, y, y, y)
    starts = np.unique(np.linspace(0, len(x), min(points, len(x)) + 1).astype(np.int64)[:-1])
    ends = np.append(starts[1:], len(x))
    means = np.add.reduceat(y, starts) / (ends - starts)
    return Curve(x[ends - 1], means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def smoothed(y: Floats, width: int) -> Floats:
    """Return the running mean over up to `width` values around each."""
    if len(y) < 3 or width < 2:
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    places = np.arange(len(y))
    first, last = np.maximum(0, places - width // 2), np.minimum(len(y), places + width // 2 + 1)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _events(lines: Sequence[str]) -> Iterator[Event]:
    """Parse a chunk at once, which is quicker; line by line where one of them is not whole."""
    try:
        found: list[Any] = json.loads(f"[{','.join(lines)}]")
    except json.JSONDecodeError:
        found = list(map(parsed, lines))
    return (each for each in found if isinstance(each, dict) and "kind" in each and "time" in each)


def _columns(steps: list[Event], stages: dict[str, int]) -> dict[str, Floats]:
    for step in steps:
        stages.setdefault(step["stage"], len(stages))
    found: dict[str, Floats] = {"stage": np.array([stages[step["stage"]] for step in steps], np.float64)}
    for name in {name for step in (steps[0], steps[-1]) for name in step} - {"kind", "stage", "losses"}:
        values = [step.get(name) for step in steps]
        if any(isinstance(value, int | float) for value in (values[0], values[-1])):
            found[name] = np.array([np.nan if v is None else v for v in values], np.float64)
    parts = {part for step in (steps[0], steps[-1]) for part in step.get("losses", {})}
    for part in parts:
        found[f"loss of {part}"] = np.array(
            [step.get("losses", {}).get(part, np.nan) for step in steps], np.float64
        )
    return found


def _of(piece: dict[str, Floats], name: str) -> Floats:
    return piece[name] if name in piece else np.full(len(piece["step"]), np.nan)
