"""Heads of clusters that tests start by `ray start`, and end by their number."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import free_port

COMMAND = (str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2")


@contextmanager
def running(
    folder: Path, options: list[str], variables: dict[str, str], is_up: Callable[[], object], look_s: float
) -> Iterator[None]:
    """Start a head, and go on when it is up; end it afterwards, and delete its folder.

    Args:
        folder: Ray's own, with the log.
        options: of `ray start`, besides.
        variables: its environment.
        is_up: whether it answers; asked every `look_s` seconds.
    """
    command = [*COMMAND, *options, f"--temp-dir={folder}", f"--dashboard-agent-listen-port={free_port()}"]
    command.append("--object-store-memory=80000000")
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        until_s = time.monotonic() + 90
        while not is_up():
            assert time.monotonic() < until_s, (folder / "head.log").read_text()
            time.sleep(look_s)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
