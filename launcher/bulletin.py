"""The actor between driver and workers. A file of its own: its process imports nothing but this."""

import time

import ray

from launcher import pulse
from launcher.report.record import Event


@ray.remote(num_cpus=0)
class Bulletin(pulse.Board):
    """Where workers post events and heartbeats, which the driver reads, and the driver wishes, which rank 0 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.num_dropped = 0
        self.wish = ""

    def post(self, event: Event) -> None:
        """Add an event, with the time where it has none."""
        self.events.append({"time": round(time.time(), 3), **event})

    def read(self, start: int) -> list[Event]:
        """Return the events from number `start` on; those before it have been read, and are dropped."""
        del self.events[: start - self.num_dropped]
        self.num_dropped = start
        return self.events

    def ask(self, wish: str) -> None:
        """Wish that the workers save and leave at the next step; empty takes it back."""
        self.wish = wish

    def asked(self) -> str:
        """Return what is wished for."""
        return self.wish
