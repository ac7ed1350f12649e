"""A link between two hosts that takes its time: two TUN devices, and a relay that holds every packet back.

The kernel's own `netem` does this where it is built in; here it is not.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import hosts

DEVICE = "far"
MTU = 9000
"""Large, as in data centres: the relay's work is by packet."""
_TUNSETIFF, _TUN, _NO_INFO = 0x400454CA, 0x0001, 0x1000


def address(number: int) -> str:
    """The address of a host on this link."""
    return f"10.77.42.{number}"


class Relay:
    """The process that holds packets back."""

    def __init__(self) -> None:
        spaces = [f"/run/netns/{hosts.name(number)}" for number in (1, 2)]
        command = [sys.executable, str(Path(__file__).resolve()), *spaces]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not self.process.stdout or not self.process.stdout.readline():
            raise RuntimeError("the relay has not begun: it needs root and /dev/net/tun")

    def set(self, delay_s: float, bits_per_s: float | None) -> None:
        """From now on every packet takes so long, and goes out no faster than that."""
        print(delay_s, file=self.process.stdin, flush=True)
        for number in (1, 2):
            hosts.throttle(number, bits_per_s, DEVICE)


@contextmanager
def linked() -> Iterator[Relay]:
    """Join hosts 1 and 2 by such a link."""
    relay = Relay()
    try:
        for number in (1, 2):
            command = ["ip", "-n", hosts.name(number)]
            for words in (
                ["addr", "add", f"{address(number)}/24", "dev", DEVICE],
                ["link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "20000", "up"],
            ):
                subprocess.run([*command, *words], check=True)
        yield relay
    finally:
        relay.process.terminate()
        relay.process.wait()


def main() -> None:
    """Hold packets back until told to end."""
    delay_s = 0.0
    ends = [_device(space) for space in sys.argv[1:]]
    held: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    print("ready", flush=True)
    while True:
        now_s = time.monotonic()
        for there, packets in zip(reversed(ends), held, strict=True):
            while packets and packets[0][0] <= now_s:
                with contextlib.suppress(OSError):
                    os.write(there, packets.popleft()[1])
        due_s = min((packets[0][0] for packets in held if packets), default=now_s + 1)
        ready, *_ = select.select([0, *ends], [], [], max(0.0, due_s - time.monotonic()))
        if 0 in ready:
            if not (line := sys.stdin.readline()):
                return
            delay_s = float(line)
        for here, packets in zip(ends, held, strict=True):
            if here in ready:
                _take(here, packets, delay_s)


def _take(end: int, packets: deque[tuple[float, bytes]], delay_s: float) -> None:
    """Take what waits at an end, up to some packets, so that none at the other has to wait long."""
    for _ in range(64):
        try:
            packet = os.read(end, 65_536)
        except BlockingIOError:
            return
        packets.append((time.monotonic() + delay_s, packet))


def _device(space: str) -> int:
    """Make a TUN device in a host's network namespace; return its file."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as mine, open(space) as theirs:
        for each in (theirs, mine):
            if libc.setns(each.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
            if each is theirs:
                end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _TUN | _NO_INFO))
    return end


if __name__ == "__main__":
    main()
