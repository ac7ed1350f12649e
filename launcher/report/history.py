"""What happened in a run, out of the events of all its generations of workers. Pure."""

from dataclasses import dataclass, field
from typing import Any

from launcher.report.record import Event

BREAKS = ("failure", "halved", "hung", "rolled_back")
"""After these the workers are started anew."""
WHY = {
    "preempted": "a node is about to go",
    "grow": "nodes have come",
    "lost": "workers were lost",
    "stop": "the user stops the run",
}
"""Why a generation of workers ended, or was asked to, in words."""
_TOLD = {
    "failure": ("reason", "ranks"),
    "halved": ("stage", "reason"),
    "rolled_back": ("stage", "step", "reason"),
    "skipped": ("stage", "step", "fault"),
    "checkpoint": ("stage", "step", "bytes", "stall_s", "save_s"),
    "left": ("stage", "step", "reason"),
    "stopped": ("type", "message"),
    "hung": ("stage", "step"),
    "export": ("stage",),
}
"""Of the events that matter, the values that are kept."""


@dataclass(slots=True)
class Life:
    """One generation of workers, as the driver saw it.

    Attributes:
        begun_s, ended_s: by the clock, in seconds since 1970.
        events: all that it posted, in order; steps not all of them.
        nodes_gone: of its nodes, those that are there no more.
        reason: why it ended, where that was no error.
    """

    num_workers: int
    begun_s: float
    events: list[Event] = field(default_factory=list)
    ended_s: float = 0.0
    nodes_gone: int = 0
    reason: str = ""


@dataclass(slots=True)
class History:
    """What came of all lives.

    Attributes:
        events: those that matter, each with kind and time.
        stage, step, num_steps, step_s: the last step, and when it was.
        saved, saved_s: the step that the run would continue from in that stage, and when it was reached.
        restarts, restart_s, again: how often workers began anew, what it took, steps trained once more.
        hosts: of the ranks, as they began last.
        oom_kills: by host, the count when its first worker began and when its last one did.
        said, is_lost: of the last failure, by rank.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    stage: str = ""
    step: int = 0
    num_steps: int = 0
    step_s: float = 0.0
    saved: int = 0
    saved_s: float = 0.0
    restarts: int = 0
    restart_s: float = 0.0
    again: int = 0
    hosts: dict[int, str] = field(default_factory=dict)
    oom_kills: dict[str, tuple[int, int]] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)
    is_lost: bool = False
    broken_s: float | None = None

    def take(self, event: Event) -> None:
        """Take one event."""
        kind, time_s = event["kind"], event.get("time", 0.0)
        if kind in BREAKS and self.broken_s is None:
            self.broken_s = self.step_s or time_s
        take = getattr(self, f"_{kind}", None)
        if take is not None:
            take(event, time_s)
        if kind in _TOLD:
            kept = {name: event[name] for name in _TOLD[kind] if name in event}
            self.events.append({"kind": kind, "time": time_s, **kept})

    def _worker(self, event: Event, time_s: float) -> None:
        host = event.get("host", "")
        self.hosts[event["rank"]] = host
        first, _ = self.oom_kills.get(host, (event.get("oom_kills", 0), 0))
        self.oom_kills[host] = (first, event.get("oom_kills", 0))

    def _stage_begin(self, event: Event, time_s: float) -> None:
        if self.broken_s is not None and event["stage"] == self.stage:
            self.again += max(0, self.step - event["start"])
        self.stage, self.num_steps = event["stage"], event["num_steps"]
        self.step = self.saved = event["start"]
        self.saved_s = time_s

    def _step(self, event: Event, time_s: float) -> None:
        if self.broken_s is not None:
            seconds = round(time_s - self.broken_s, 2)
            self.restarts, self.restart_s, self.broken_s = self.restarts + 1, self.restart_s + seconds, None
            self.events.append(
                {
                    "kind": "restart",
                    "time": time_s,
                    "seconds": seconds,
                    "stage": self.stage,
                    "from": self.saved,
                }
            )
        self.stage, self.step, self.step_s = event["stage"], event["step"], time_s

    def _skipped(self, event: Event, time_s: float) -> None:
        self._step(event, time_s)

    def _checkpoint(self, event: Event, time_s: float) -> None:
        if event["stage"] == self.stage:
            self.saved, self.saved_s = event["step"], time_s

    def _seen(self, event: Event, time_s: float) -> None:
        self.said = {int(rank): text for rank, text in event["said"].items()}
        self.is_lost = event["is_lost"]


def of(lives: list[Life], last_records: list[Event]) -> History:
    """Return what happened.

    Args:
        lives: all generations, in order.
        last_records: the end of the record in the run directory, which has every step.
    """
    found = History()
    for i, life in enumerate(lives):
        before = lives[i - 1] if i else None
        if before is None:
            found.events.append({"kind": "start", "time": life.begun_s, "num_workers": life.num_workers})
        else:
            is_resize = before.num_workers != life.num_workers
            told = {"num_workers": life.num_workers, "was": before.num_workers, "reason": before.reason}
            kind = "resize" if is_resize else "again"
            found.events.append({"kind": kind, "time": life.begun_s, **told})
            found.broken_s = found.broken_s or found.step_s or before.ended_s
        for event in life.events:
            found.take(event)
    # What rank 0 wrote and did not post any more, of steps that go by too quickly.
    for record in last_records:
        is_new = record.get("stage") == found.stage and record.get("time", 0.0) > found.step_s
        if record["kind"] in ("step", "skipped") and is_new and record["step"] > found.step:
            found.step, found.step_s = record["step"], record["time"]
    return found
