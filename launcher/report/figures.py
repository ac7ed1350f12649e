"""Events of the record to what Prometheus is shown: the metrics, and their values from time to time. Pure."""

from dataclasses import dataclass, field
from typing import Literal

from launcher.report.history import BREAKS
from launcher.report.points import use_of_a_token
from launcher.report.record import Event

STILL_S, STILL_STEPS = 60.0, 3
"""When no step has come for so long, and for the time of so many steps, there is no speed to show."""
Kind = Literal["gauge", "counter"]
METRICS: dict[str, tuple[Kind, str]] = {
    "launcher_step": ("gauge", "The step of the stage that was trained last."),
    "launcher_num_steps": ("gauge", "The steps that the stage will have."),
    "launcher_loss": ("gauge", "The loss of the last step."),
    "launcher_learning_rate": ("gauge", "The learning rate of the last step."),
    "launcher_gradient_norm": ("gauge", "The gradient's norm of the last step, before clipping."),
    "launcher_tokens": ("counter", "Tokens that were trained on, padding left out."),
    "launcher_samples": ("counter", "Samples that were trained on."),
    "launcher_tokens_per_second": ("gauge", "Tokens a second of training, of all workers together."),
    "launcher_mfu_share": ("gauge", "Model FLOPs used, of what the workers could do at their peak."),
    "launcher_padding_share": ("gauge", "The share of what was computed that was padding."),
    "launcher_data_wait_share": ("gauge", "The share of the steps' time in which they waited for data."),
    "launcher_saved_step": ("gauge", "The step of the stage that the last checkpoint holds."),
    "launcher_checkpoint_age_seconds": (
        "gauge",
        "Seconds since the last checkpoint, or the stage's begin.",
    ),
    "launcher_failures": ("gauge", "How often workers failed, in this try."),
    "launcher_restarts": ("gauge", "How often workers went on after a failure, in this try."),
    "launcher_workers": ("gauge", "Workers in training."),
    "launcher_eval": ("gauge", "What the last evaluation found, by metric."),
}
"""By name, without Ray's prefix `ray_`; a counter gets the suffix `_total` too."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One value: to be set, or of a counter to be added.

    Attributes:
        metric: of an evaluation; of others empty.
    """

    name: str
    stage: str
    value: float
    metric: str = ""


@dataclass(slots=True)
class Figures:
    """Takes all events, and gives what is to be shown.

    Attributes:
        gauges: all that hold now, each to be set again and again: Ray's agent forgets one that is not, after 20 s.
            So what a stage showed goes by itself when the stage is over.
        added: to the counters, since they were read last.
        spent: by the steps since then.
        stepped_s, step_s: when the last steps were read, and how long the last one took.
    """

    stage: str = ""
    num_failures: int = 0
    num_restarts: int = 0
    is_broken: bool = False
    use: float = 0.0
    saved_s: float | None = None
    gauges: dict[tuple[str, str, str], float] = field(default_factory=dict)
    added: dict[tuple[str, str, str], float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    stepped_s: float = 0.0
    step_s: float = 0.0

    def take(self, event: Event) -> None:
        """Take one event."""
        take = getattr(self, f"_{event['kind']}", None)
        if take is not None:
            take(event)
        if event["kind"] in BREAKS:
            self.num_failures, self.is_broken = self.num_failures + 1, True
            self._set("launcher_failures", self.num_failures)

    def read(self, now_s: float) -> list[Figure]:
        """Return all gauges, and what is to be added to counters.

        Args:
            now_s: by the clock, in seconds since 1970.
        """
        if self.saved_s is not None:
            self._set("launcher_checkpoint_age_seconds", max(0.0, now_s - self.saved_s))
        of = self.spent
        if of:
            self.stepped_s = now_s
        elif now_s - self.stepped_s > max(STILL_S, STILL_STEPS * self.step_s):
            for name in _OF_SPEED:
                self.gauges.pop((name, self.stage, ""), None)
        if of.get("step_s") and of["slots"]:
            self._set("launcher_tokens_per_second", of["tokens"] / of["step_s"])
            if self.use:
                self._set("launcher_mfu_share", self.use * of["tokens"] / of["step_s"])
            self._set("launcher_padding_share", 1 - of["tokens"] / of["slots"])
            self._set("launcher_data_wait_share", of["data_s"] / of["step_s"])
        each = [*self.gauges.items(), *self.added.items()]
        self.added, self.spent = {}, {}
        return [Figure(name, stage, value, metric) for (name, stage, metric), value in each]

    def _stage_begin(self, event: Event) -> None:
        if self.stage and event["stage"] != self.stage:
            self.spent = {}
            self.gauges = {
                place: value for place, value in self.gauges.items() if place[0] == "launcher_eval"
            }
        if self.is_broken:
            self.num_restarts, self.is_broken = self.num_restarts + 1, False
        self.stage, self.saved_s, self.use = event["stage"], event["time"], use_of_a_token(event)
        self._set("launcher_num_steps", event["num_steps"])
        self._set("launcher_step", event["start"])
        self._set("launcher_saved_step", event["start"])
        self._set("launcher_workers", event["num_workers"])
        self._set("launcher_failures", self.num_failures)
        self._set("launcher_restarts", self.num_restarts)

    def _step(self, event: Event) -> None:
        self._set("launcher_step", event["step"])
        self.step_s = event["step_s"]
        for name, key in _STEP.items():
            if event.get(key) is not None:
                self._set(name, event[key])
        for key in ("tokens", "samples", "slots", "step_s", "data_s"):
            self.spent[key] = self.spent.get(key, 0.0) + event[key]
        for name in ("tokens", "samples"):
            place = (f"launcher_{name}", self.stage, "")
            self.added[place] = self.added.get(place, 0.0) + event[name]

    def _checkpoint(self, event: Event) -> None:
        if event["stage"] == self.stage:
            self.saved_s = event["time"]
            self._set("launcher_saved_step", event["step"])

    def _eval(self, event: Event) -> None:
        for metric, value in event["metrics"].items():
            if isinstance(value, int | float):
                self.gauges["launcher_eval", event["stage"], metric] = float(value)

    def _set(self, name: str, value: float) -> None:
        self.gauges[name, self.stage, ""] = float(value)


_STEP = {
    "launcher_loss": "loss",
    "launcher_learning_rate": "lr",
    "launcher_gradient_norm": "gradient_norm",
}
_OF_SPEED = (
    "launcher_tokens_per_second",
    "launcher_mfu_share",
    "launcher_padding_share",
    "launcher_data_wait_share",
)
