"""How far a run is, out of its events: what every view of it shows. Pure; the clock is an argument.

The events are those of the record, those that only the driver hears of (`worker`, `failure`, …), and `run`, which says
beforehand what is to come (`launcher.report.opened` makes it out of a run directory).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from launcher.report.history import BREAKS
from launcher.report.record import Event

NUM_LOSSES, NUM_RECENT = 600, 60
_SPENT = ("tokens", "slots", "data_s", "step_s")


class Stage(NamedTuple):
    """One stage, as it is known.

    Attributes:
        num_steps: 0: not known yet.
        forecast_s: seconds of a step, as forecast; None: unknown.
        memory: bytes at the peak of a worker, predicted, by `device` and `host`.
        metrics: of its last evaluation.
    """

    name: str
    num_steps: int = 0
    is_done: bool = False
    forecast_s: float | None = None
    memory: dict[str, int | None] = {}  # noqa: RUF012  # Never changed: stages are replaced.
    metrics: dict[str, float] = {}  # noqa: RUF012


class Next(NamedTuple):
    """The next checkpoint: after which step, where that is known, and in how many seconds."""

    step: int | None
    in_s: float | None


@dataclass(slots=True)
class Progress:
    """What is known of a run. `take` brings it up to date.

    Attributes:
        stages: by name, in order.
        stage: the one in training; empty: none has begun.
        begun: what its `stage_begin` said.
        last: its last `step` event; empty: none yet.
        first_s, first_step: of the steps that this saw.
        losses: of its last steps that this saw, each with its step.
        recent: its last `step` events, for rates.
        spent: sums over its steps: tokens, slots, data_s, step_s and stall_s.
        used: bytes at the peak of the first worker, by `device` and `host`.
        saved: its last checkpoint's event; empty: none that this saw.
        restarts: how often workers began anew.
        is_broken: whether they are just about to.
        said: what is going on while nothing trains, in words.
    """

    name: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)
    save_steps: int | None = None
    save_minutes: float | None = None
    stage: str = ""
    begun: Event = field(default_factory=dict)
    begun_s: float = 0.0
    last: Event = field(default_factory=dict)
    first_s: float = 0.0
    first_step: int = 0
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=NUM_LOSSES))
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    spent: dict[str, float] = field(default_factory=dict)
    used: dict[str, int | None] = field(default_factory=dict)
    saved: Event = field(default_factory=dict)
    evaluated: dict[str, dict[str, float]] = field(default_factory=dict)
    preparation: Event = field(default_factory=dict)
    restarts: int = 0
    is_broken: bool = False
    said: str = ""

    def take(self, event: Event) -> None:
        """Take one event; unknown ones pass."""
        kind = event["kind"]
        if kind in BREAKS:
            self.restarts += 1
            self.is_broken, self.said = True, "the workers are started again"
        take = getattr(self, f"_{kind}", None)
        if take is not None:
            take(event)

    def copy(self) -> "Progress":
        """Return what stays as it is while this takes more; events and stages are never changed."""
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("stages", "losses", "recent", "spent", "used", "evaluated"):
            values[name] = values[name].copy()
        return Progress(**values)

    def _run(self, event: Event) -> None:
        # Of several runs, as with seeds, each begins with nothing known.
        begun = Progress()
        for name in self.__slots__:
            setattr(self, name, getattr(begun, name))
        self.name, self.said = event["name"], event.get("said", "")
        self.save_steps, self.save_minutes = event["save_steps"], event["save_minutes"]
        for each in event["stages"]:
            self.stages[each["name"]] = Stage(**each)

    def _report(self, event: Event) -> None:
        self.restarts = event["restarts"]

    def _preparation(self, event: Event) -> None:
        self.preparation = event

    def _worker(self, event: Event) -> None:
        self.said = "the workers build the model" if not self.stage else self.said

    def _stage_begin(self, event: Event) -> None:
        if self.stage and event["stage"] != self.stage:
            self._mark_done(self.stage)
        self.stage, self.begun, self.begun_s = event["stage"], event, event["time"]
        known = self.stages.get(self.stage, Stage(self.stage))
        self.stages[self.stage] = known._replace(num_steps=event["num_steps"], is_done=False)
        self.last, self.saved, self.is_broken, self.said = {}, {}, False, ""
        self.losses.clear()
        self.recent.clear()
        self.spent, self.used = {}, {}

    def _step(self, event: Event) -> None:
        if not self.last:
            self.first_s, self.first_step = event["time"], event["step"]
        self.last, self.is_broken, self.said = event, False, ""
        self.losses.append((event["step"], event["loss"]))
        self.recent.append(event)
        for name in _SPENT:
            self.spent[name] = self.spent.get(name, 0) + event.get(name, 0)

    def _usage(self, event: Event) -> None:
        self.used = event["memory"]
        # Of all steps of this process: a driver sees some of them, who comes later the last ones.
        self.spent = dict(event["spent"])

    def _eval(self, event: Event) -> None:
        self.evaluated[event["stage"]] = event["metrics"]
        if (known := self.stages.get(event["stage"])) is not None:
            self.stages[known.name] = known._replace(metrics=event["metrics"])

    def _checkpoint(self, event: Event) -> None:
        if event["stage"] == self.stage:
            self.saved = event
            self.spent["stall_s"] = self.spent.get("stall_s", 0) + event["stall_s"]

    def _export(self, event: Event) -> None:
        self._mark_done(event["stage"])

    def _stage_done(self, event: Event) -> None:
        known = self.stages.get(event["stage"])
        if known is not None:
            metrics, steps = event.get("metrics") or known.metrics, event.get("steps") or known.num_steps
            self.stages[known.name] = known._replace(is_done=True, metrics=metrics, num_steps=steps)

    def _after(self, event: Event) -> None:
        self._mark_done(self.stage)
        self.said = "what was forgotten is measured"

    def _mark_done(self, name: str) -> None:
        if name in self.stages:
            self.stages[name] = self.stages[name]._replace(is_done=True)

    @property
    def step(self) -> int:
        """The last step of the stage in training."""
        return int(self.last["step"] if self.last else self.begun.get("start", 0))

    @property
    def num_steps(self) -> int:
        """Of the stage in training."""
        return int(self.begun.get("num_steps", 0))

    def per_second(self, name: str) -> float | None:
        """Return how many tokens or samples the last steps trained in a second; None: there is no step yet."""
        return _ratio(_sum(self.recent, name), _sum(self.recent, "step_s"))

    def mfu(self) -> float | None:
        """Return the share of the workers' peak that the last steps used; None where the record does not tell it."""
        flops, peak = self.begun.get("flops_per_token"), self.begun.get("peak_flops")
        rate = self.per_second("tokens")
        if not flops or not peak or rate is None:
            return None
        return float(flops * rate / (peak * self.begun["num_workers"]))

    def padding(self) -> float | None:
        """Return the share of padding in all that was computed."""
        slots = self.spent.get("slots", 0)
        return 1 - self.spent["tokens"] / slots if slots else None

    def data_share(self) -> float | None:
        """Return the share of the steps' time that was spent waiting for data."""
        return _ratio(self.spent.get("data_s", 0), self.spent.get("step_s", 0))

    def checkpoint_share(self) -> float | None:
        """Return the share of the time for which training stood still to save."""
        stall_s = self.spent.get("stall_s", 0)
        elapsed_s = (
            max(self.spent.get("step_s", 0), self.last.get("time", 0) - self.begun_s) if self.last else 0
        )
        return _ratio(stall_s, stall_s + elapsed_s)

    def per_step_s(self) -> float | None:
        """Return the seconds from one step to the next, with all that comes between; None: not known yet."""
        steps = self.step - self.first_step if self.last else 0
        return _ratio(self.last.get("time", 0) - self.first_s, steps) if steps > 0 else None

    def stage_left_s(self) -> float | None:
        """Return the seconds that the stage will still take, about."""
        per_step_s = self.per_step_s()
        return None if per_step_s is None else per_step_s * max(0, self.num_steps - self.step)

    def run_left_s(self) -> float | None:
        """Return the seconds of steps that the run will still take, about: stages to come as forecast, in proportion."""
        left_s, per_step_s = self.stage_left_s(), self.per_step_s()
        if left_s is None or per_step_s is None:
            return None
        now = self.stages.get(self.stage)
        if now is None:
            return None  # A record whose begin is not there.
        for each in self.stages.values():
            if each.is_done or each.name == self.stage:
                continue
            if not each.num_steps:
                return None
            ratio = each.forecast_s / now.forecast_s if each.forecast_s and now.forecast_s else 1.0
            left_s += each.num_steps * per_step_s * ratio
        return left_s

    def next_checkpoint(self, now_s: float) -> Next | None:
        """Return when the next checkpoint is due: by steps, by the clock, or at the stage's end; None: no stage trains."""
        if not self.num_steps or self.step >= self.num_steps:
            return None
        every, at = self.save_steps, self.num_steps
        if every:
            at = min(at, (self.step // every + 1) * every)
        per_step_s = self.per_step_s()
        in_s = None if per_step_s is None else per_step_s * (at - self.step)
        if self.save_minutes:
            since_s = self.saved.get("time", self.begun_s)
            clock_s = max(0.0, since_s + 60 * self.save_minutes - now_s)
            if in_s is None or clock_s < in_s:
                return Next(None, clock_s)
        return Next(at, in_s)


def _sum(events: Iterable[Event], name: str) -> float:
    return float(sum(event.get(name, 0) for event in events))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
