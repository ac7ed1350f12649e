"""Whether workers hang, and which of them keeps the others waiting: decided from heartbeats. Pure."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from launcher.processes import Seen
from launcher.pulse import Beat, Phase, Place

LIMITS_S: dict[Phase, float] = {
    "begin": 1800,  # Imports from a slow disk.
    "load": 3600,  # Weights from one, which all ranks read.
    "build": 3600,  # DeepSpeed's engine, whose ops may have to be compiled.
    "restore": 3600,
    "data": 3600,  # Where the preparation goes on beside training.
    "step": 1800,  # The first ones: kernels are chosen and compiled. Later ones: see below.
    "evaluate": 1800,  # One batch: answers may have to be generated.
    "save": 3600,
    "export": 3600,
    "wait": 3600,  # For rank 0 between two stages.
}
"""By phase, the longest time without a sign of progress."""
STEP_FLOOR_S, STEPS = 120.0, 20.0
"""Of a step: so many usual ones, but at least this: a new shape may be compiled, and a false alarm costs a restart."""
SILENT_S = 900.0
"""Without a heartbeat nothing is allowed longer: one C call that keeps Python's lock is seldom as long."""
LONGEST_S = max(LIMITS_S.values())

BEATS_EVERY_S = 1.0
MISSED_S = 5.0
"""Without a heartbeat for so long, a worker is called silent."""
_FIRST_STEPS = 3
_MOST_BETWEEN_LOOKS_S = 3.0
_ORDER: list[Phase] = [
    "begin", "load", "build", "restore", "data", "step", "evaluate", "save", "export", "wait", "done"
]  # fmt: skip
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "torch\\distributed\\")


def collective_timeout_s(hang_minutes: float | None) -> int:
    """Return how long a collective may last: longer than any limit, since its end would name no one."""
    return round(2 * max(LONGEST_S, 60 * (hang_minutes or 0)))


@dataclass(frozen=True, slots=True)
class Hang:
    """Workers that do not go on.

    Attributes:
        idle_s: since the last sign of progress of any.
        limit_s: what was allowed.
        beats: the last heartbeat of each that has ever sent one.
        silent_s: by rank, since its last heartbeat, of those that have sent none for long.
        missing: ranks that have sent none at all.
    """

    idle_s: float
    limit_s: float
    beats: Mapping[int, Beat]
    silent_s: Mapping[int, float]
    missing: tuple[int, ...] = ()

    @property
    def place(self) -> Place:
        """How far the workers have come: the furthest of them."""
        return max((beat.place for beat in self.beats.values()), key=_order)


class Watch:
    """Looks at the heartbeats of one group of workers after another.

    Time counts only while it looks at least every few seconds: of a driver that was itself stopped, or cut
    off, nobody can say that the workers did not go on meanwhile.
    """

    def __init__(self, num_workers: int, hang_minutes: float | None = None) -> None:
        """Begin to watch.

        Args:
            num_workers: of a group.
            hang_minutes: the limit of a step in place of the usual ones' multiple; longer phases get as much.
        """
        self.num_workers, self.asked_s = num_workers, 60 * hang_minutes if hang_minutes else None
        self.looked_s: float | None = None
        self.watched_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self.beats: dict[int, Beat] = {}
        self.heard_s: dict[int, float] = {}
        self.moved_s = self.stepped_s = self.watched_s
        self.usual_s: deque[float] = deque(maxlen=50)
        self.furthest = Place(0, "", 0, "begin")

    def look(self, now_s: float, beats: Mapping[int, Beat]) -> Hang | None:
        """Return the hang, if there is one.

        Args:
            now_s: of any clock that goes on evenly.
            beats: the last one of each rank.
        """
        if self.looked_s is not None:
            self.watched_s += min(now_s - self.looked_s, _MOST_BETWEEN_LOOKS_S)
        self.looked_s = now_s
        if not beats:
            self._begin()
            return None
        for rank, beat in beats.items():
            self._take(rank, beat)
        working = {rank: beat for rank, beat in self.beats.items() if beat.place.phase != "done"}
        if not working:
            return None
        idle_s, limit_s = self.watched_s - self.moved_s, self._limit_s(working)
        if idle_s <= limit_s:
            return None
        silent_s = {rank: self.watched_s - self.heard_s[rank] for rank in working}
        return Hang(
            idle_s,
            limit_s,
            working,
            {rank: each for rank, each in silent_s.items() if each > MISSED_S},
            tuple(rank for rank in range(self.num_workers) if rank not in self.beats),
        )

    def _take(self, rank: int, beat: Beat) -> None:
        known = self.beats.get(rank)
        if known == beat:
            return
        self.beats[rank], self.heard_s[rank] = beat, self.watched_s
        if known is None or (known.process, known.place) != (beat.process, beat.place):
            self.moved_s = self.watched_s
        place, before = beat.place, self.furthest
        if place.num_begun > before.num_begun:
            self.usual_s.clear()
        elif place.num_begun == before.num_begun and place.step > before.step:
            # A step under way is not made yet, and the first that is seen has an unknown begin.
            if before.step:
                made = place.step - before.step
                each_s = (self.watched_s - self.stepped_s) / made
                self.usual_s.extend([each_s] * min(made, 50))
        else:
            return
        self.furthest, self.stepped_s = place, self.watched_s

    def _limit_s(self, working: Mapping[int, Beat]) -> float:
        """Return the most generous limit of the phases that workers are in: the others wait for it."""
        phases: set[Phase] = {beat.place.phase for beat in working.values()}
        if len(self.beats) < self.num_workers:
            phases.add("begin")
        limit_s = max(self._limit_of(phase) for phase in phases)
        longest_silence_s = max(self.watched_s - self.heard_s[rank] for rank in working)
        if longest_silence_s > SILENT_S:
            limit_s = min(limit_s, max(SILENT_S, self.asked_s or 0))
        return limit_s

    def _limit_of(self, phase: Phase) -> float:
        if phase == "step" and len(self.usual_s) >= _FIRST_STEPS:
            usual_s = max(STEP_FLOOR_S, STEPS * median(self.usual_s))
            return self.asked_s or min(LONGEST_S, usual_s)
        return max(LIMITS_S[phase], self.asked_s or 0)


def message(hang: Hang, seen: Mapping[int, Seen]) -> str:
    """Return in one line which ranks keep the others waiting, on which hosts, in which phase.

    Args:
        hang: that was found.
        seen: by rank, the process's state and stacks, as far as its node has answered.
    """
    ranks, what = _behind(hang, seen)
    others = [beat.place for rank, beat in sorted(hang.beats.items()) if rank not in ranks]
    text = f"no step for {hang.idle_s:,.0f} s: " if hang.place.step else f"nothing for {hang.idle_s:,.0f} s: "
    if not ranks:
        return text + f"all ranks are in {_words(hang.place)}; their heartbeats go on"
    hosts = sorted({hang.beats[rank].host for rank in ranks if rank in hang.beats})
    text += f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    text += f" on {', '.join(hosts)}" if hosts else ""
    places = [hang.beats[rank].place for rank in ranks if rank in hang.beats]
    # A silent one may have come further than it could tell.
    at = ", last in" if hang.silent_s.keys() & set(ranks) else ", in"
    text += f" {what}" + (f"{at} {_words(min(places, key=_order))}" if places else "")
    if others:
        furthest = max(others, key=_order)
        text += "; the others wait in " + (f"step {furthest.step}" if furthest.step else furthest.phase)
    return text


def report(hang: Hang, told: str, seen: Mapping[int, Seen]) -> str:
    """Return what is kept of a hang: what was told, where every rank is, and the stacks of those that answered."""
    lines = [told, ""]
    for rank, beat in sorted(hang.beats.items()):
        silent = f"; no heartbeat for {hang.silent_s[rank]:,.0f} s" if rank in hang.silent_s else ""
        state = f"; {seen[rank].state}" if rank in seen and seen[rank].state else ""
        at = f"rank {rank} on {beat.host}, process {beat.process.pid}: {_words(beat.place)}"
        lines.append(at + silent + state)
    for rank in sorted(hang.beats):
        stacks = seen[rank].stacks if rank in seen else ""
        lines += ["", f"--- rank {rank}", stacks.rstrip() or "gave no stacks: it did not answer in time"]
    return "\n".join(lines) + "\n"


def _behind(hang: Hang, seen: Mapping[int, Seen]) -> tuple[list[int], str]:
    """Return the ranks that the others wait for, and what is the matter with them; the surest sign first."""
    if hang.missing:
        return list(hang.missing), "has sent no heartbeat at all"
    if states := {rank: each.state for rank, each in sorted(seen.items()) if each.state}:
        first = next(iter(states))
        since = f"has sent no heartbeat for {hang.silent_s[first]:,.0f} s: " if first in hang.silent_s else ""
        return list(states), f"{since}{states[first]}" if since else f"does not go on: {states[first]}"
    if hang.silent_s:
        most_s = max(hang.silent_s.values())
        return sorted(hang.silent_s), f"has sent no heartbeat for {most_s:,.0f} s"
    orders = {rank: _order(beat.place) for rank, beat in hang.beats.items()}
    if len(set(orders.values())) > 1:
        least = min(orders.values())
        return sorted(rank for rank, order in orders.items() if order == least), "is behind"
    # All are in the same step: who does not wait for the others there is waited for.
    stacks = {rank: each.stacks for rank, each in seen.items() if each.stacks}
    apart = sorted(rank for rank, text in stacks.items() if not is_in_collective(text))
    if apart and len(apart) < len(stacks):
        return apart, "is in no collective"
    return [], ""


def is_in_collective(stacks: str) -> bool:
    """Return whether the innermost frames of any thread are those of a collective."""
    threads: Iterable[str] = stacks.split("\n\n")
    return any(any(words in frame for words in _COLLECTIVES) for frame in _innermost(threads))


def _innermost(threads: Iterable[str], depth: int = 4) -> list[str]:
    return [
        frame
        for thread in threads
        for frame in [line for line in thread.splitlines() if line.lstrip().startswith("File ")][:depth]
    ]


def _order(place: Place) -> tuple[int, int, int, int]:
    return place.num_begun, place.step, _ORDER.index(place.phase), place.tick


def _words(place: Place) -> str:
    if not place.stage:
        return "its begin"
    if place.phase == "step":
        return f"step {place.step} of stage {place.stage}"
    at = f" at step {place.step}" if place.step else ""
    return f"phase {place.phase}{at} of stage {place.stage}"
