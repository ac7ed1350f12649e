"""The end of a record: read from its back, then followed. Gigabytes before it are never read whole."""

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.report.record import Event, parsed

TAIL_BYTES, BLOCK_BYTES = 1 << 18, 1 << 22
_TELLS = ("stage_begin", "usage")
"""Of these either is enough to begin from: a usage holds what the stage's begin said."""


class Tail:
    """Reads the newest events of a record, and then those that come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_to, self.file_id = 0, 0

    def last(self) -> list[Event]:
        """Return the last events, from some step of the last stage on; before them its `stage_begin`.

        A stage that began anew after a failure is given from its last begin on.
        """
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self.file_id, size = status.st_ino, status.st_size
                start = max(0, size - TAIL_BYTES)
                events = _parse(_lines(file.fileno(), start, size))
                while start and not any(event["kind"] in _TELLS for event in events):
                    start = max(0, start - BLOCK_BYTES)
                    if found := _last_telling(file.fileno(), start, min(size, start + 2 * BLOCK_BYTES)):
                        events.insert(0, found)
                        break
                whole = _end_of_lines(file.fileno(), size)
        except FileNotFoundError:
            return []
        self.read_to = whole
        return _from_the_begin(events)

    def new(self) -> list[Event]:
        """Return the events that have come since; a line that is being written comes with the next call."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.file_id or status.st_size < self.read_to:
                    self.file_id, self.read_to = status.st_ino, 0
                text = os.pread(file.fileno(), min(status.st_size - self.read_to, BLOCK_BYTES), self.read_to)
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.read_to += len(whole)
        return _parse(whole)


def _lines(file: int, start: int, end: int) -> bytes:
    """Return the whole lines between two places: the first is left out where it began before."""
    text = os.pread(file, end - start, start)
    first = text.find(b"\n") + 1 if start else 0
    return text[first : text.rfind(b"\n") + 1]


def _end_of_lines(file: int, size: int) -> int:
    """Return where the last whole line ends."""
    end = size
    while end:
        start = max(0, end - TAIL_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _last_telling(file: int, start: int, end: int) -> Event | None:
    """Return the last event of some lines that a view can begin from."""
    text = _lines(file, start, end)
    at = max(text.rfind(f'{{"kind": "{kind}"'.encode()) for kind in _TELLS)
    return None if at < 0 else next(_events(text[at : text.index(b"\n", at)]), None)


def _parse(text: bytes) -> list[Event]:
    return list(_events(text))


def _events(text: bytes) -> Iterator[Event]:
    for event in map(parsed, text.splitlines()):
        if event is not None and "time" in event:
            yield event


def _from_the_begin(events: list[Event]) -> list[Event]:
    """Leave out what came before the last begin of the last stage; make that, where only a usage tells of it."""
    begins = [i for i, event in enumerate(events) if event["kind"] == "stage_begin"]
    if begins:
        return events[begins[-1] :]
    usages = [event for event in events if event["kind"] == "usage"]
    if not usages:
        return events
    told = usages[-1]
    spent_s = told["spent"].get("step_s", 0) + told["spent"].get("stall_s", 0)
    begin = {"kind": "stage_begin", "stage": told["stage"], **told["begun"], "time": told["time"] - spent_s}
    evaluated = [
        {"kind": "eval", "time": told["time"], "stage": name, "step": told["step"], "metrics": values}
        for name, values in told["metrics"].items()
    ]
    return [begin, *evaluated, *events]
