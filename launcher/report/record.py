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

    def write(self, kind: str, **values: Any) -> None:
        """Record an event: its kind (step, eval, checkpoint, stage_begin, …), the time, its values."""
        event = {"kind": kind, "time": round(time.time(), 3), **values}
        if self.file is not None:
            self.file.write(json.dumps(event) + "\n")
        if self.listener is not None:
            self.listener(event)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
