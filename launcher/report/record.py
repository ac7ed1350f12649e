"""One record a step, as JSON lines in the run directory. Everything that shows progress reads these."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Recorder:
    """Appends events to a file and hands each to whoever listens."""

    def __init__(self, path: Path | None, listener: Callable[[Event], None] | None = None) -> None:
        self.listener = listener
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8", buffering=1) if path is not None else None
        if path is not None and self.file is not None and _is_cut(path):
            # A process was killed while it wrote: its line must not swallow the next one.
            self.file.write("\n")

    def write(self, kind: str, **values: Any) -> None:
        """Record an event: its kind (step, eval, checkpoint, stage_begin, …), the time, its values."""
        event = {"kind": kind, "time": round(time.time(), 3), **values}
        self.keep(event)
        if self.listener is not None:
            self.listener(event)

    def keep(self, event: Event) -> None:
        """Write an event that another process has told, as it is."""
        if self.file is not None:
            self.file.write(json.dumps(event) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def parsed(line: str | bytes) -> Event | None:
    """Return the event of a line; None where it is not whole, as of a process that was killed while it wrote."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def _is_cut(path: Path) -> bool:
    """Whether a file's last line has no end."""
    if path.stat().st_size == 0:  # Also where it is a pipe.
        return False
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
