"""Reading a run's record behind the run: whole lines only, from a position that can be kept."""

from pathlib import Path

from launcher.report.record import Event, parsed

CHUNK_BYTES = 1 << 20


class Reading:
    """Reads the record from a position on, and remembers how far it is.

    Attributes:
        position: in bytes, after the last line that was taken.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path, self.position = path, position

    def take(self) -> list[Event]:
        """Return the next events, of about a megabyte at most; none where there is nothing new yet."""
        while whole := self._next():
            self.position += len(whole)
            if events := [event for line in whole.splitlines() if (event := parsed(line)) is not None]:
                return events
        return []

    def _next(self) -> bytes:
        try:
            # Opened anew each time: over NFS, only that shows what another machine has written meanwhile.
            with open(self.path, "rb") as file:
                file.seek(self.position)
                read = file.read(CHUNK_BYTES)
                if len(read) == CHUNK_BYTES:
                    read += file.readline()
        except FileNotFoundError:
            return b""
        return read[: read.rfind(b"\n") + 1]

    def go_to_end(self) -> None:
        """Pass by what is there already."""
        if self.path.exists():
            self.position = self.path.stat().st_size
