"""Processes of this machine: which one a number means, what state it is in, its stacks, its end."""

import contextlib
import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

SHOW = signal.SIGUSR1
"""Makes a worker write the stacks of all its threads. The handler is C, so a thread that keeps Python's lock in
a call that does not return is seen too; a stopped process does not answer."""
STACKS_WITHIN_S = 3.0

_STATES = {
    "T": "its process is stopped",
    "t": "its process is held by a debugger",
    "D": "its process waits for a disk or a network file system",
    "Z": "its process has died",
    "X": "its process has died",
}


@dataclass(frozen=True, slots=True)
class Process:
    """A process, for sure: numbers are given again, but not at the same time.

    Attributes:
        pid: its number.
        started: in clock ticks since the machine's start; None where the system does not tell.
    """

    pid: int
    started: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found of a process that hangs: its state in words, where that explains it; its stacks, if any came."""

    state: str
    stacks: str


def this() -> Process:
    """Return this process."""
    return Process(os.getpid(), _status(os.getpid())[1])


def is_of_a_job() -> bool:
    """Return whether this process is the driver of a submitted Ray job, as Ray tells it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def begun_s() -> float:
    """Return when this process began, in seconds since 1970; now, where the system does not tell."""
    started = this().started
    if started is None:
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))


def state(process: Process) -> str:
    """Return what keeps a process from running, in words; empty: nothing that the system knows of."""
    status, started = _status(process.pid)
    if not is_there(process) or started != process.started:
        return "its process is gone"
    return _STATES.get(status, "")


def is_there(process: Process) -> bool:
    """Return whether there is still such a process: not another one with its number."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # Another user's: ours has ended.
    return _status(process.pid)[1] == process.started


def show_on_signal(path: Path) -> None:
    """Write this process's stacks to the end of a file whenever `SHOW` comes, for as long as it lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # faulthandler keeps the file, and with it its number, to which the handler writes.
    faulthandler.register(SHOW, file=open(path, "a", encoding="utf-8"), all_threads=True)


def look(workers: dict[int, tuple[Process, str]], within_s: float = STACKS_WITHIN_S) -> dict[int, Seen]:
    """Ask processes of this machine for their stacks, all at once.

    Args:
        workers: by rank, its process and the file that it writes them to.
        within_s: how long to wait for them.
    """
    sizes = {rank: _size(path) for rank, (_, path) in workers.items()}
    asked = [rank for rank, (process, _) in workers.items() if state(process) == ""]
    for rank in asked:
        with contextlib.suppress(OSError):
            os.kill(workers[rank][0].pid, SHOW)
    until_s, before = time.monotonic() + within_s, -1
    while asked and time.monotonic() < until_s:
        time.sleep(0.3)
        now = sum(_size(path) for _, path in workers.values())
        if now == before and all(_size(workers[rank][1]) > sizes[rank] for rank in asked):
            break  # All have answered, and are done with it.
        before = now
    return {rank: Seen(state(process), _text(path, sizes[rank])) for rank, (process, path) in workers.items()}


def end(processes: list[Process]) -> int:
    """End processes of this machine at once, stopped ones too; return how many there still were."""
    there = [process for process in processes if is_there(process)]
    for process in there:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
    return len(there)


def _status(pid: int) -> tuple[str, int | None]:
    """Return the letter of a process's state, and when it started; unknown where there is no /proc."""
    try:
        # The name, which comes before, may hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return "", None
    values = fields.split()
    return values[0], int(values[19])


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _text(path: str, start: int) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(start)
            return file.read()
    except OSError:
        return ""
