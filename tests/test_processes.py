"""Real processes: which, in what state, with what stacks, ended."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import processes
from launcher.processes import Process

PROGRAM = """
import sys, time
from pathlib import Path
from launcher import processes
processes.show_on_signal(Path(sys.argv[1]))
def waits_for_ever():
    print(processes.this().started, flush=True)
    time.sleep(100)
waits_for_ever()
"""


@pytest.fixture
def child(tmp_path: Path):
    """A process that sleeps in Python, and the file of its stacks."""
    path = tmp_path / "stacks.txt"
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True)
    started = int(child.stdout.readline())
    yield child, Process(child.pid, started), str(path)
    child.kill()
    child.wait()


def test_a_process_shows_its_stacks(child) -> None:
    _, process, path = child
    for _ in range(2):  # The second time not those of the first again.
        (seen,) = processes.look({3: (process, path)}).values()
        assert seen.state == ""
        assert seen.stacks.count("waits_for_ever") == 1


def test_a_stopped_process_is_named_and_ended(child) -> None:
    popen, process, path = child
    popen.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    (seen,) = processes.look({3: (process, path)}, within_s=0.5).values()
    assert (seen.state, seen.stacks) == ("its process is stopped", "")
    assert processes.end([process]) == 1
    assert popen.wait(5) == -signal.SIGKILL
    assert processes.state(process) == "its process is gone"
    assert processes.end([process]) == 0


def test_another_process_with_the_same_number_is_left_alone(child) -> None:
    popen, process, path = child
    other = Process(process.pid, (process.started or 0) + 1)
    assert processes.end([other]) == 0
    (seen,) = processes.look({0: (other, path)}, within_s=0.5).values()
    assert (seen.state, seen.stacks) == ("its process is gone", "")
    assert popen.poll() is None


def test_when_this_process_began() -> None:
    code = "import time; t = time.time(); from launcher.processes import begun_s; print(t - begun_s())"
    before_s = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert -0.02 <= float(result.stdout) <= time.monotonic() - before_s + 0.02
