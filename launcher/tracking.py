"""The trackers of a run as its driver has them: a process each, started, listened to, ended."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import trackers
from launcher.trackers.follow import LAST_S

_START_S = 2.0
"""What a process may take to end beyond the time that it gives itself."""


@contextmanager
def followed(run_dir: Path, asked: tuple[Any, ...], say: Callable[[str], None]) -> Iterator[None]:
    """Have a run's trackers read its record until the block ends, and for some seconds after that.

    Args:
        run_dir: of the run, which has begun.
        asked: the recipe's trackers.
        say: is told, once for each, what is wrong with it.
    """
    followers: list[_Process] = []
    try:
        for name in trackers.names(asked):
            try:
                followers.append(_Process(run_dir, name, say))
            except OSError as error:
                say(f"tracker {name} cannot be started ({error}); the run goes on without it")
        yield
    finally:
        try:
            _end(followers, time.monotonic() + LAST_S + _START_S)
        except KeyboardInterrupt:
            # Who interrupts here wants to wait no more: how the run ended is known, and stays as it is.
            _end(followers, time.monotonic())


def _end(followers: list["_Process"], until_s: float) -> None:
    for each in followers:
        each.let_end()
    for each in followers:
        each.wait(until_s)


class _Process:
    """The process of one tracker."""

    def __init__(self, run_dir: Path, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say, self.has_told = name, say, False
        self.log = run_dir / "logs" / f"tracker-{name}.log"
        self.log.parent.mkdir(exist_ok=True)
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher.trackers.follow", str(run_dir), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                # Keys pressed at the terminal are the driver's.
                start_new_session=True,
                text=True,
            )
        threading.Thread(target=self._listen, daemon=True, name=f"tracker-{name}").start()

    def let_end(self) -> None:
        """Tell it that the record will not grow any more."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def wait(self, until_s: float) -> None:
        """Wait for its end; end it when its time is up."""
        try:
            code = self.process.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code and not self.has_told:
            self._tell(f"{self.name} has not taken all of the record")

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._tell(line.strip())

    def _tell(self, line: str) -> None:
        self.has_told = True
        self.say(f"tracker {line} (log: {self.log})")
