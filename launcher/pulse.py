"""Where a worker is in its work, as it tells the driver every second: what a hang is seen by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from launcher.processes import Process

Phase = Literal[
    "begin", "load", "build", "restore", "data", "step", "evaluate", "save", "export", "wait", "done"
]
"""What a worker does: `data` waits for a batch, `wait` for the other workers between stages."""

T = TypeVar("T")


class Pulse:
    """Where this worker is: plain attributes, which training assigns and another thread reads.

    The assignments of a step take 20 ns together (tests/test_hangs.py measures them) and no lock; a heartbeat
    takes half a millisecond of a core, each second. The reader may see a new step with the old phase: then
    its next look sees both.
    """

    __slots__ = ("num_begun", "phase", "stage", "step", "tick")

    def __init__(self) -> None:
        self.phase: Phase = "begin"
        self.stage, self.num_begun, self.step, self.tick = "", 0, 0, 0

    def begin(self, stage: str) -> None:
        """Enter a stage: its first phase is to load."""
        self.stage, self.step, self.phase = stage, 0, "load"
        self.num_begun += 1

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of a long phase, each of which shows that it goes on."""
        for batch in batches:
            self.tick += 1
            yield batch


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is; places of one generation of workers can be compared.

    Attributes:
        num_begun: stages that this process has begun.
        stage: the last of them.
        step: being made, or made last.
        phase: in it.
        tick: of the phase's batches.
    """

    num_begun: int
    stage: str
    step: int
    phase: Phase
    tick: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat.

    Attributes:
        rank: of the worker.
        host: its machine's name.
        node: the id of its Ray node.
        process: which sent it.
        number: of this heartbeat of the process, so that a new one is known without a clock.
        place: where the worker is.
    """

    rank: int
    host: str
    node: str
    process: Process
    number: int
    place: Place


class Board:
    """The last heartbeat of every worker; and the hang that its end is due to, once one was found."""

    def __init__(self) -> None:
        self.last: dict[int, Beat] = {}
        self.gone: set[tuple[str, Process]] = set()
        self.hang: tuple[str, str, int] | None = None

    def beat(self, beat: Beat) -> None:
        """Take a heartbeat. One of workers that have failed, which may come late, is none any more."""
        if (beat.node, beat.process) not in self.gone:
            self.last[beat.rank] = beat

    def beats(self) -> dict[int, Beat]:
        """Return the last heartbeat of each rank."""
        return self.last

    def found(self, message: str, stage: str, step: int) -> None:
        """Note that these workers hang, in which step of which stage, before they are ended for it."""
        self.hang = message, stage, step
        self._forget()

    def failed(self) -> tuple[str, str, int] | None:
        """Forget the workers, now that some have failed; return the hang for which they were ended, if any."""
        hang, self.hang = self.hang, None
        self._forget()
        return hang

    def _forget(self) -> None:
        self.gone |= {(beat.node, beat.process) for beat in self.last.values()}
        self.last = {}
