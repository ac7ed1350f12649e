"""What a person sees while a run goes: a panel on a terminal, with lines that scroll by above it; plain lines elsewhere."""

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from launcher.report import lines
from launcher.report.progress import Progress
from launcher.report.record import Event

if TYPE_CHECKING:
    from launcher.report.screen import Screen

EVERY_S = 5.0
"""How often a line of one kind is printed, at most: of steps, preparation, checkpoints."""


class View:
    """Shows events as they come."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Begin with nothing known.

        Args:
            stream: default: standard output. A terminal gets the panel.
        """
        self.stream = stream or sys.stdout
        self.is_live = self.stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self.progress, self.lock, self.printing = Progress(), threading.Lock(), threading.Lock()
        self.screen: Screen | None = None
        self.printed_at_s: dict[str, float] = {}

    def show(self, event: Event) -> None:
        """Show one event of the record, or of those that the driver hears of."""
        with self.lock:
            self.progress.take(event)
        if self.is_live and event["kind"] in _OPENS:
            self._draw()
        kind = event["kind"]
        if kind in _OF_PROGRESS:
            self._show_progress(event)
        elif (text := lines.of(event)) and self._is_due(kind, always=kind != "checkpoint"):
            self.say(text)

    def prime(self, event: Event) -> None:
        """Take an event of before, without a line of its own."""
        with self.lock:
            self.progress.take(event)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        with self.printing:
            if self.screen is not None:
                self.screen.say(text)
            else:
                print(text, file=self.stream, flush=True)

    def end_line(self) -> None:
        """Take the panel away, so that what follows stands where it was; an event brings it back."""
        with self.printing:
            screen, self.screen = self.screen, None
            if screen is not None:
                screen.close()

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_line()

    def _draw(self) -> None:
        """Let the panel be drawn anew, soon; the first time, begin it."""
        with self.printing:
            if self.screen is None:
                from launcher.report.screen import Screen

                self.screen = Screen(self.stream, self._snapshot)
            self.screen.is_stale = True

    def _snapshot(self) -> Progress:
        with self.lock:
            return self.progress.copy()

    def _show_progress(self, event: Event) -> None:
        """Print how far it is, where no panel shows that."""
        kind, progress = event["kind"], self.progress
        if kind == "stage_begin":
            self.printed_at_s.clear()
            self.say(lines.of(event))
        elif kind == "preparation" and not progress.stage:
            if event["is_whole"] or (not self.is_live and self._is_due(kind)):
                self.say(lines.preparation(event))
        elif kind == "step" and not self.is_live:
            if self._is_due(kind, always=event["step"] == progress.num_steps):
                self.say(lines.step(progress, progress.padding(), progress.data_share()))
        elif kind == "usage" and not self.is_live:
            self.say(lines.usage(progress, event["time"]))

    def _is_due(self, kind: str, *, always: bool = False) -> bool:
        now_s = time.monotonic()
        if not always and now_s - self.printed_at_s.get(kind, -EVERY_S) < EVERY_S:
            return False
        self.printed_at_s[kind] = now_s
        return True


_OF_PROGRESS = ("stage_begin", "preparation", "step", "usage")
_OPENS = ("run", "report", "worker", "preparation", "stage_begin", "step")
