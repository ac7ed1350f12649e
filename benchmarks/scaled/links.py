"""Steps measured over a throttled link between two hosts, and what the plan says of them."""

import pickle
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaled import far, group, work
from launcher.plan import pace, traffic
from launcher.plan.cluster import Cluster
from tests import hosts

PORT = 29_611
ENDLESS = 1e12
HEADERS = {"lnk": 1448 / 1514, far.DEVICE: 8948 / 9000}
"""What of the bytes that `tc` counts is the users': TCP's payload in a frame, by interface."""


@dataclass(frozen=True, slots=True)
class Point:
    """A setting of the link, and how many steps are made over it."""

    bits_per_s: float | None
    delay_s: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the prediction is given of this machine.

    Attributes:
        gloo_bytes_s: of gloo's where the link has no limit; fitted on ZeRO-2 over that link.
        call_s: of each collective besides; fitted on ZeRO-3, which makes many, over that link.
    """

    gloo_bytes_s: float
    call_s: float = 0.0


class Lab:
    """Two hosts and their ranks."""

    def __init__(
        self, folder: Path, jobs: dict[str, work.Job], per_host: int = 1, *, is_far: bool = False
    ) -> None:
        """Two hosts with so many ranks each, joined by the switch or by the link that takes its time."""
        self.folder, self.jobs, self.per_host, self.is_far = folder, jobs, per_host, is_far
        (folder / "jobs").write_bytes(pickle.dumps(jobs))
        self.relay: far.Relay | None = None

    @contextmanager
    def ranks(self) -> Iterator[group.Group]:
        """Start the ranks."""
        before = [hosts.on(1 + i // self.per_host, []) for i in range(2 * self.per_host)]
        with hosts.hosts(2), _relay(self.is_far) as self.relay:
            address, interface = (far.address(1), far.DEVICE) if self.is_far else (hosts.address(1), "lnk")
            log = self.folder / "ranks.log"
            with group.ranks(self.folder / "jobs", log, address, PORT, interface, before) as found:
                yield found

    def set(self, point: Point) -> None:
        """Throttle the link."""
        if self.relay is not None:
            self.relay.set(point.delay_s, point.bits_per_s)
            return
        for number in (1, 2):
            hosts.throttle(number, point.bits_per_s)

    def measure(self, ranks: group.Group, point: Point) -> dict[str, Any]:
        """Return what a step took at a point.

        Returns:
            `step_s`; `compute_s`: what of it was not spent waiting in collectives, of the rank with most;
            `sent`: bytes of the first host.
        """
        self.set(point)
        return of_steps(ranks.tell("steps", number=point.steps), point.steps)

    def predicted(self, job: work.Job, point: Point, known: Known, compute_s: float) -> tuple[pace.Pace, int]:
        """Return the plan's pace of a step, and the bytes that it says a worker sends."""
        world = 2 * self.per_host
        stage, shapes, settings = job.shapes(world)
        exchanges = traffic.of_step(shapes, settings, stage)
        interface = far.DEVICE if self.is_far else "lnk"
        link = ENDLESS if point.bits_per_s is None else point.bits_per_s / 8 * HEADERS[interface]
        cluster = Cluster(
            num_nodes=2,
            workers_per_node=self.per_host,
            device="cpu",
            node_bandwidth=min(link, known.gloo_bytes_s),
            latency_s=point.delay_s,
            call_s=known.call_s,
        )
        share = 1 / 4 if stage.recomputes else 1 / 3
        found = pace.of_step(
            exchanges,
            settings,
            cluster,
            work_s=compute_s,
            forward_share=share,
            rounds=stage.accumulation,
        )
        return found, traffic.sent_bytes(exchanges, "cpu")


@contextmanager
def _relay(is_far: bool) -> Iterator[far.Relay | None]:
    if not is_far:
        yield None
        return
    with far.linked() as relay:
        yield relay


def middle(answers: list[dict[str, Any]], name: str) -> float:
    """Return the median over the steps of the slowest rank's seconds."""
    return statistics.median(max(each) for each in zip(*(answer[name] for answer in answers), strict=True))


def of_steps(told: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return medians over the steps that all ranks have told of."""
    own = [{"own": [a - b for a, b in zip(each["seconds"], each["waited"], strict=True)]} for each in told]
    return {
        "step_s": middle(told, "seconds"),
        "compute_s": middle(own, "own"),
        "sent": told[0]["sent"] / number,
    }


def compared(lab: Lab, name: str, point: Point, measured: dict[str, Any], known: Known) -> dict[str, Any]:
    """Return one row: what was measured and predicted, and the ratios."""
    found, sent = lab.predicted(lab.jobs[name], point, known, measured["compute_s"])
    return {
        "job": name,
        "ranks": 2 * lab.per_host,
        "mbit_per_s": None if point.bits_per_s is None else point.bits_per_s / 1e6,
        "delay_ms": point.delay_s * 1e3,
        "compute_s": round(measured["compute_s"], 4),
        "measured_s": round(measured["step_s"], 4),
        "predicted_s": round(found.step_s, 4),
        "ratio": round(found.step_s / measured["step_s"], 3),
        "sent": round(measured["sent"]),
        "predicted_sent": sent,
        "sent_ratio": round(lab.per_host * sent / measured["sent"], 3) if lab.per_host == 1 else None,
        "limit": found.limit,
    }
