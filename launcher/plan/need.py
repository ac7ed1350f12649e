"""What takes memory on a worker: items, each at a place and in some phases of a stage."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["load", "compute", "update", "save", "export"]
PHASES: tuple[Phase, ...] = ("load", "compute", "update", "save", "export")
"""In their order. `load` ends when the weights lie as training has them; `compute` is forward and backward."""
ALWAYS = PHASES
TRAINING: tuple[Phase, ...] = ("compute", "update", "save", "export")


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory.

    Attributes:
        place: on the device of a worker, or in its host's memory, for each worker.
        bytes: while it is there.
        phases: in which it is there.
        why: the formula, and where it comes from.
    """

    name: str
    place: Literal["device", "host"]
    bytes: int
    phases: tuple[Phase, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Need:
    """All items of a stage, for one worker."""

    items: tuple[Item, ...]

    def at(self, phase: Phase, place: str | None = None) -> int:
        """Return the bytes in use in a phase, on the device or the host; by default on both."""
        return sum(i.bytes for i in self.items if phase in i.phases and place in (None, i.place))

    def peak(self, place: str) -> tuple[int, Phase]:
        """Return the most bytes in use at a place, and in which phase."""
        return max((self.at(phase, place), phase) for phase in PHASES)

    def tightest(self, place: str) -> Item:
        """Return the largest item of the phase that needs most."""
        phase = self.peak(place)[1]
        return max((i for i in self.items if i.place == place and phase in i.phases), key=lambda i: i.bytes)
