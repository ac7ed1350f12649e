"""The panel on a terminal: drawn by a thread of its own, and kept whole whatever else writes to the terminal."""

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console, ConsoleDimensions
from rich.live import Live

from launcher.report import panel
from launcher.report.progress import Progress

DRAW_EVERY_S, CLOCK_EVERY_S = 0.25, 1.0
"""The panel is drawn when something has changed, and once a second for the clock."""


_ECHO = "^C"
"""What a terminal writes when a person presses it: behind the panel there is room, so that no line is begun."""


class Screen:
    """The panel, from when it is made until it is closed."""

    def __init__(self, stream: TextIO, progress: Callable[[], Progress]) -> None:
        """Draw the panel, and go on drawing it.

        Args:
            stream: the terminal.
            progress: returns what is to be shown, which nobody changes any more.
        """
        self.progress, self.is_stale, self.is_drawn = progress, True, True
        self.stream, self.chatter = stream, _Chatter(stream)
        self.console = Console(file=self.chatter.terminal, highlight=False)
        self.live = Live(
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start()
        self.said: deque[str] = deque()
        self.drawn_s, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="panel")
        self.thread.start()

    def say(self, text: str) -> None:
        """Print text above the panel, soon: who says it does not wait for the terminal."""
        self.said.append(text)

    def close(self) -> None:
        """Take the panel away, and give the terminal back."""
        self.ended.set()
        try:
            self.thread.join()
        finally:
            if self.is_drawn:
                self._take_away()
            rest = self.chatter.close()
        with contextlib.suppress(OSError):
            if rest:
                print(rest, end="", file=sys.stderr, flush=True)
            if self.said:
                print("\n".join(self.said), file=self.stream, flush=True)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self.ended.is_set()
            try:
                self._print()
                if self.is_drawn and not is_last:
                    self._draw_if_due()
            except Exception as error:
                self._draw_no_more(error)
            self.ended.wait(DRAW_EVERY_S)

    def _draw_no_more(self, error: Exception) -> None:
        """Leave only lines: a panel that cannot be drawn must not take with it what is said."""
        if self.is_drawn:
            self.is_drawn = False
            # At its end it would draw once more, which may be just what it cannot.
            self.live.update("")
            self._take_away()
            self.said.append(f"the panel cannot be drawn any more: {type(error).__name__}: {error}")

    def _take_away(self) -> None:
        with contextlib.suppress(Exception):
            self.live.stop()

    def _print(self) -> None:
        texts = self.chatter.lines()
        while self.said:
            texts.append(self.said.popleft())
        if not texts:
            return
        # All at once: for each print the panel is drawn again. The terminal may be gone: a run is not to end for that.
        try:
            with contextlib.suppress(OSError):
                if self.is_drawn:
                    self.console.print("\n".join(texts), markup=False, highlight=False, soft_wrap=True)
                else:
                    print("\n".join(texts), file=self.chatter.terminal, flush=True)
        except Exception:
            self.said.extendleft(reversed(texts))
            raise

    def _draw_if_due(self) -> None:
        if self.is_stale or time.monotonic() - self.drawn_s >= CLOCK_EVERY_S:
            self._draw()

    def _draw(self) -> None:
        self.is_stale, self.drawn_s = False, time.monotonic()
        self._measure()
        is_plain = not (self.console.encoding or "").lower().startswith("utf")
        width = self.console.width - len(_ECHO)
        drawn = panel.panel(self.progress(), time.time(), width, is_plain=is_plain)
        with contextlib.suppress(OSError):
            self.live.update(drawn, refresh=True)

    def _measure(self) -> None:
        """Take over the terminal's size: rich asks the standard streams, which may lead elsewhere by now."""
        with contextlib.suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.chatter.terminal.fileno())
            if columns and rows and "COLUMNS" not in os.environ:
                self.console.size = ConsoleDimensions(columns, rows)


class _Chatter:
    """What libraries write to the terminal, also from C++: gathered in a file, so that it comes above the panel.

    A file, not a pipe: whoever writes never waits for a reader.
    """

    def __init__(self, stream: TextIO) -> None:
        self.file = -1
        self.kept: list[tuple[int, int]] = []
        self.read_to, self.terminal = 0, stream
        # Only the real standard streams, and of them those that go to the terminal.
        numbers = list(_terminals()) if stream is sys.stdout else []
        if not numbers:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.terminal = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
        self.file, name = tempfile.mkstemp(prefix="launcher-")
        append = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.unlink(name)
        for number in numbers:
            self.kept.append((number, os.dup(number)))
            os.dup2(append, number)
        os.close(append)

    def lines(self) -> list[str]:
        """Return the whole lines that have come since."""
        text = self._new()
        whole = text[: text.rfind(b"\n") + 1]
        self.read_to += len(whole)
        return whole.decode(errors="replace").splitlines()

    def close(self) -> str:
        """Give the streams back; return what has come since."""
        if self.file < 0:
            return ""
        for number, kept in self.kept:
            os.dup2(kept, number)
            os.close(kept)
        rest = self._new()
        os.close(self.file)
        self.terminal.close()
        return rest.decode(errors="replace")

    def _new(self) -> bytes:
        if self.file < 0:
            return b""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        size = os.fstat(self.file).st_size
        return os.pread(self.file, size - self.read_to, self.read_to) if size > self.read_to else b""


def _terminals() -> Iterator[int]:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if os.isatty(stream.fileno()):
                yield stream.fileno()
