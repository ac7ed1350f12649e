"""Hosts with addresses of their own: network namespaces on one bridge."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs import environment

# Of this process alone, so that two runs on one machine do not meet.
SWITCH = f"launcher-{os.getpid()}-switch"
PORT, DASHBOARD, AGENT = 41_379, 41_265, 41_366
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


def name(number: int) -> str:
    """The namespace of a host; the first is 1."""
    return f"launcher-{os.getpid()}-{number}"


def address(number: int) -> str:
    """The address of a host."""
    return f"10.77.41.{number}"


def on(number: int, command: Sequence[str]) -> list[str]:
    """The command that runs a command on a host."""
    return ["ip", "netns", "exec", name(number), *command]


def set_link(number: int, state: str) -> None:
    """Set a host's link `up` or `down`."""
    _ip("-n", name(number), "link", "set", "lnk", state)


def throttle(number: int, bits_per_s: float | None, device: str = "lnk") -> None:
    """Let a host send no faster than that; None: as fast as it can."""
    with contextlib.suppress(subprocess.CalledProcessError):
        _tc(number, "del", device)
    if bits_per_s is not None:
        # Two milliseconds' worth at once; a queue that TCP does not overflow.
        burst = max(20_000, round(bits_per_s / 8 * 0.002))
        queue = ("burst", str(burst), "limit", "64000000")
        _tc(number, "add", device, "tbf", "rate", f"{round(bits_per_s)}bit", *queue)


@contextmanager
def hosts(number: int) -> Iterator[None]:
    """Make so many hosts, and take them away at the end; skips where that is not possible."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        _ip("netns", "add", SWITCH)
        _ip("-n", SWITCH, "link", "add", "sw", "type", "bridge")
        _ip("-n", SWITCH, "link", "set", "sw", "up")
        for i in range(1, number + 1):
            _add(i)
        yield
    finally:
        for each in (SWITCH, *(name(i) for i in range(1, number + 1))):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", each)
            shutil.rmtree(Path("/etc/netns") / each, ignore_errors=True)


@contextmanager
def ray_on(*numbers: int, dashboard: bool = False) -> Iterator[str]:
    """Start Ray with a CPU on each of these hosts, the head on the first; yield its address."""
    folders = [tempfile.mkdtemp(prefix="ray-") for _ in numbers]
    head, started = f"{address(numbers[0])}:{PORT}", []
    show = [f"--dashboard-host={address(numbers[0])}", f"--dashboard-port={DASHBOARD}"]
    try:
        for i, folder in zip(numbers, folders, strict=True):
            place = [f"--address={head}"]
            if i == numbers[0]:
                place = ["--head", f"--port={PORT}"]
                place += show if dashboard else ["--include-dashboard=false"]
            # Without it, a host's folder would be the first's.
            place += [f"--temp-dir={folder}"]
            place += [f"--node-ip-address={address(i)}", f"--dashboard-agent-listen-port={AGENT}"]
            ray = str(Path(sys.executable).parent / "ray")
            command = [ray, "start", *place, "--num-cpus=1", "--object-store-memory=80000000", "--block"]
            path = os.pathsep.join([str(Path(ray).parent), os.environ["PATH"]])
            own = environment(PATH=path, PYTHONPATH=str(ROOT), RAY_TMPDIR=folder, **TOKEN)
            with open(Path(folder) / "log", "wb") as log:
                started.append(
                    subprocess.Popen(on(i, command), env=own, stdout=log, stderr=log, start_new_session=True)
                )
            time.sleep(8)
        yield head
    finally:
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGTERM)
        time.sleep(3)
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _add(number: int) -> None:
    host, end = name(number), f"port{number}"
    _ip("netns", "add", host)
    folder = Path("/etc/netns") / host
    folder.mkdir(parents=True, exist_ok=True)
    # Of each host its own name is its own address, as on machines of a cloud.
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address(number)} {socket.gethostname()}\n")
    _ip("link", "add", "lnk", "netns", host, "type", "veth", "peer", "name", end, "netns", SWITCH)
    _ip("-n", SWITCH, "link", "set", end, "master", "sw")
    _ip("-n", SWITCH, "link", "set", end, "up")
    _ip("-n", host, "addr", "add", f"{address(number)}/24", "dev", "lnk")
    _ip("-n", host, "link", "set", "lo", "up")
    _ip("-n", host, "link", "set", "lnk", "up")
    # A connection that was still for a moment begins anew from next to nothing; what is measured here is the link.
    still = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
    subprocess.run(on(number, ["sh", "-c", f"echo 0 > {still}"]), check=True)


def _tc(number: int, verb: str, device: str, *discipline: str) -> None:
    command = ["tc", "-n", name(number), "qdisc", verb, "dev", device, "root", *discipline]
    subprocess.run(command, check=True, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
