"""What a start was made of, from the command to the first step. Pure."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.report.history import Life


@dataclass(slots=True)
class Marks:
    """The driver's own part: when what was done, by the clock.

    Attributes:
        begun_s: when its process began.
        ended: by part, when it was done, in their order.
    """

    begun_s: float
    ended: dict[str, float] = field(default_factory=dict)

    def note(self, part: str) -> None:
        """Note that a part is done."""
        self.ended[part] = time.time()


def told(marks: Marks, lives: Sequence[Life]) -> dict[str, Any]:
    """Return when the process began, and `parts`, for the report."""
    return {"begun": round(marks.begun_s, 3), "seconds": parts(marks, lives)}


def parts(marks: Marks, lives: Sequence[Life]) -> dict[str, float]:
    """Return the seconds of each part in order, until the first step of the first workers; those that came to be.

    Args:
        marks: of the driver.
        lives: of the workers, the first one first.
    """
    found: dict[str, float] = {}
    before_s = marks.begun_s
    ended = list(marks.ended.items())
    if lives:
        events = lives[0].events
        first = {
            kind: [e["time"] for e in events if e["kind"] == kind]
            for kind in ("worker", "stage_begin", "step")
        }
        begun = first["stage_begin"][:1]
        # Each rank tells once that it is there; those of later starts come after the first stage has begun.
        there = [each for each in first["worker"] if not begun or each <= begun[0]]
        ended += [("starting workers", max(there))] if there else []
        ended += [("building the model and engine", begun[0])] if begun else []
        ended += [("the first step", first["step"][0])] if begun and first["step"] else []
    for part, ended_s in ended:
        found[part], before_s = round(ended_s - before_s, 3), ended_s
    return found
