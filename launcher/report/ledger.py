"""Where a run's time went: every second of its tries under one heading, so that all add up to the whole. Pure."""

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.report.curves import Floats, Record

LINES = {
    "steps": "training steps that count",
    "data": "waiting for data",
    "checkpoint": "standing still for checkpoints",
    "evaluation": "evaluation",
    "skipped": "steps that were skipped",
    "lost": "lost work: steps trained again later",
    "unsaved": "steps since the last checkpoint",
    "restart": "restarts of the workers",
    "startup": "start-up",
    "building": "from one stage to the next",
    "export": "export, and reading it back",
    "end": "from the last sign of life to the end of the try",
    "other": "between steps",
}
"""What a second can have gone to, in the order in which it is told."""
FIRST_STEP = "the first step, beyond a usual one"
WAITING = "starting workers and building the model"
_OF_WORKERS = ("starting workers", "building the model and engine", "the first step")
_BREAKS = ("failure", "halved", "hung", "rolled_back", "resize", "again", "left")
_WIDE = 1 / 300
"""Of a try: a shorter evaluation is not drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One process that drove the run.

    Attributes:
        begun_s, ended_s: by the clock.
        kind: of its verdict.
        startup: seconds by part of the start, as far as they are known.
        events: what its driver kept.
        num_workers: that it began with.
    """

    begun_s: float
    ended_s: float
    kind: str
    startup: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    num_workers: int = 1


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time of one kind, for drawing."""

    begin_s: float
    end_s: float
    kind: str


@dataclass(slots=True)
class Ledger:
    """Where the time went.

    Attributes:
        seconds: by line of `LINES`.
        worker_s: the same, each second times the workers that were held.
        startup: of the start-up, the seconds by part.
        whole_s: from the begin of each try to its end, all tries together.
        spans: of each try, for drawing; those that lie on others come later.
        is_lost: of each step of the record, whether it was trained again later.
        is_unsaved: of each step, whether no checkpoint and no export holds it.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    worker_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    startup: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    whole_s: float = 0.0
    spans: list[list[Span]] = field(default_factory=list)
    is_lost: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    is_unsaved: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def goodput(self) -> float:
        """The share of all workers' time that went into training steps that count."""
        whole = sum(self.worker_s.values())
        return self.worker_s["steps"] / whole if whole else 0.0

    def add(self, kind: str, seconds: float, workers: int) -> None:
        """Book some seconds."""
        self.seconds[kind] += seconds
        self.worker_s[kind] += seconds * workers


@dataclass(frozen=True, slots=True)
class _Life:
    """From one `stage_begin` to the next: its steps are those from `first` to before `after`."""

    stage: str
    start: int
    begun_s: float
    workers: int
    event: int
    first: int
    after: int


def ledger(record: Record, tries: Sequence[Try], done: Sequence[str] = ()) -> Ledger:
    """Return where the time of all tries went.

    Args:
        record: the run's.
        tries: in order. Records belong to the last one that had begun by then.
        done: the stages that are finished: nothing of them is unsaved.
    """
    book, lives = Ledger(), _lives(record)
    book.is_lost, book.is_unsaved = _lost(record, lives), _unsaved(record, lives, done)
    begins = [each.begun_s for each in tries]
    owners = [max(0, bisect.bisect_right(begins, life.begun_s) - 1) for life in lives]
    for number, each in enumerate(tries):
        mine = [life for life, owner in zip(lives, owners, strict=True) if owner == number]
        book.spans.append([])
        _Sweep(book, record, each).run(mine)
        book.whole_s += max(0.0, each.ended_s - each.begun_s)
    return book


class _Sweep:
    """Goes through one try from its begin to its end, and books every second once."""

    def __init__(self, book: Ledger, record: Record, each: Try) -> None:
        self.book, self.record, self.each = book, record, each
        self.at_s, self.workers = each.begun_s, each.num_workers
        self.times = np.clip(record.time, each.begun_s, max(each.begun_s, each.ended_s))

    def run(self, lives: Sequence[_Life]) -> None:
        """Book the whole try."""
        self.workers = lives[0].workers if lives else self.each.num_workers
        self._start(lives[0].begun_s if lives else self.each.ended_s)
        for i, life in enumerate(lives):
            self.workers = life.workers
            after = lives[i + 1] if i + 1 < len(lives) else None
            before = lives[i - 1] if i else None
            self._steps(life, "startup" if before is None else self._between(before, life))
            self._tail(life, after)

    def _book(self, until_s: float, kind: str, part: str = "") -> None:
        """Book the time up to a moment, and go there; moments that lie behind, or beyond the end, are mended."""
        until_s = min(max(until_s, self.at_s), max(self.at_s, self.each.ended_s))
        if until_s > self.at_s:
            self.book.add(kind, until_s - self.at_s, self.workers)
            self.book.spans[-1].append(Span(self.at_s, until_s, kind))
            if kind == "startup":
                self.book.startup[part] += until_s - self.at_s
        self.at_s = until_s

    def _start(self, begun_s: float) -> None:
        for part, seconds in self.each.startup.items():
            if part != _OF_WORKERS[-1]:
                self._book(min(self.at_s + seconds, begun_s), "startup", part)
        self._book(begun_s, "startup", WAITING)

    def _steps(self, life: _Life, before: str) -> None:
        """Book from a stage's begin to its last step."""
        book, here = self.book, slice(life.first, life.after)
        times = self.times[here]
        if not len(times):
            return
        begin_s = self.at_s
        times = np.maximum(times, begin_s)
        took = np.diff(times, prepend=begin_s)
        steps = np.minimum(np.nan_to_num(self.record.column("step_s")[here]), took)
        # The first one's clock runs since before the restore; what it takes beyond a usual step is no step.
        usual = float(np.median(steps[1:])) if len(steps) > 2 else float(took[0])
        steps[0] = min(float(took[0]), usual)
        self._gaps(life, times, took - steps, before)
        data = np.minimum(np.nan_to_num(self.record.column("data_s")[here]), steps)
        lost, unsaved = book.is_lost[here], book.is_unsaved[here] & ~book.is_lost[here]
        kept = ~(lost | unsaved)
        for kind, seconds in (
            ("lost", steps[lost]),
            ("unsaved", steps[unsaved]),
            ("data", data[kept]),
            ("steps", (steps - data)[kept]),
        ):
            if len(seconds):
                book.add(kind, float(seconds.sum()), self.workers)
        self._span_steps(times, kept, lost)
        self.at_s = float(times[-1])

    def _gaps(self, life: _Life, times: Floats, gaps: Floats, before: str) -> None:
        """Book what lies between steps: mostly nothing, sometimes an evaluation or a checkpoint."""
        book, record = self.book, self.record
        book.add(before, float(gaps[0]), self.workers)
        if before == "startup":
            book.startup[FIRST_STEP] += float(gaps[0])
        left = gaps.copy()
        left[0] = 0.0
        saved = set[int]()
        for number in range(life.event + 1, len(record.events)):
            event, place = record.events[number], record.places[number] - life.first
            if event["kind"] == "stage_begin" or place >= len(gaps):
                break
            if event["kind"] == "checkpoint":
                saved.add(event["step"])
            elif event["kind"] in ("eval", "skipped") and place > 0:
                kind = "evaluation" if event["kind"] == "eval" else "skipped"
                gone = float(gaps[place] - left[place])
                seconds = min(max(0.0, event["time"] - times[place - 1] - gone), float(left[place]))
                book.add(kind, seconds, self.workers)
                begin_s = float(times[place - 1]) + gone
                if seconds > _WIDE * (self.each.ended_s - self.each.begun_s):
                    book.spans[-1].append(Span(begin_s, begin_s + seconds, kind))
                left[place] -= seconds
        is_saved = np.zeros(len(gaps), np.bool_)
        is_saved[1:] = np.isin(record.step[life.first : life.after - 1], np.fromiter(saved, np.int64))
        book.add("checkpoint", float(left[is_saved].sum()), self.workers)
        book.add("other", float(left[~is_saved].sum()), self.workers)

    def _span_steps(self, times: Floats, kept: NDArray[np.bool_], lost: NDArray[np.bool_]) -> None:
        """Draw steps as one stretch, and those that are lost, which are always the last, as another below evaluations."""
        last_kept = int(np.flatnonzero(kept)[-1]) + 1 if kept.any() else 0
        spans = [Span(self.at_s, float(times[last_kept - 1]), "steps")] if last_kept else []
        if last_kept < len(times):
            begin_s = float(times[last_kept - 1]) if last_kept else self.at_s
            spans.append(Span(begin_s, float(times[-1]), "lost" if lost.any() else "unsaved"))
        evaluations = [each for each in self.book.spans[-1] if each.begin_s >= self.at_s]
        del self.book.spans[-1][len(self.book.spans[-1]) - len(evaluations) :]
        self.book.spans[-1] += spans + evaluations

    def _tail(self, life: _Life, after: _Life | None) -> None:
        """Book from a life's last step to the next life, or to the end of the try."""
        kinds = dict.fromkeys(("eval", "after", "examples"), "evaluation")
        kinds |= {"skipped": "skipped", "export": "export", "checkpoint": "checkpoint"}
        for number in range(life.event + 1, len(self.record.events)):
            event = self.record.events[number]
            if event["kind"] == "stage_begin" or event["time"] > self.each.ended_s:
                break
            if self.record.places[number] >= life.after and event["kind"] in kinds:
                self._book(event["time"], kinds[event["kind"]])
        if after is not None:
            self._book(after.begun_s, self._between(life, after))
        else:
            self._book(self.each.ended_s, "export" if self.each.kind == "done" else "end")

    def _between(self, life: _Life, after: _Life) -> str:
        """Why workers began once more."""
        if after.stage == life.stage:
            return "restart"
        broke = any(
            event["kind"] in _BREAKS and life.begun_s < event["time"] < after.begun_s
            for event in self.each.events
        )
        return "restart" if broke else "building"


def _lives(record: Record) -> list[_Life]:
    begins = [i for i, event in enumerate(record.events) if event["kind"] == "stage_begin"]
    ends = [*(record.places[i] for i in begins[1:]), len(record.step)][: len(begins)]
    found = []
    for i, after in zip(begins, ends, strict=True):
        event = record.events[i]
        workers, first = int(event.get("num_workers", 1)), record.places[i]
        found.append(_Life(event["stage"], int(event["start"]), event["time"], workers, i, first, after))
    return found


def _lost(record: Record, lives: Sequence[_Life]) -> NDArray[np.bool_]:
    """Steps of lives behind whose place a later one began."""
    found = np.zeros(len(record.step), np.bool_)
    lowest: dict[str, int] = {}
    for life in reversed(lives):
        if life.stage in lowest:
            found[life.first : life.after] = record.step[life.first : life.after] > lowest[life.stage]
        lowest[life.stage] = min(life.start, lowest.get(life.stage, life.start))
    return found


def _unsaved(record: Record, lives: Sequence[_Life], done: Sequence[str]) -> NDArray[np.bool_]:
    """Steps behind the last checkpoint of a stage that is not finished."""
    found = np.zeros(len(record.step), np.bool_)
    lowest = {life.stage: life for life in lives if life.stage not in done}
    for life in lowest.values():
        saved = life.start
        for number in range(life.event + 1, len(record.events)):
            event = record.events[number]
            if event["kind"] == "checkpoint" and event["stage"] == life.stage:
                saved = event["step"]
        found[life.first : life.after] = record.step[life.first : life.after] > saved
    return found
