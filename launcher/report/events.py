"""What happened in a run, one line each, in order of time. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report import words
from launcher.report.forecast import size
from launcher.report.history import WHY
from launcher.report.past import Past

MOST = 300
"""Lines; of more, the first and the last are shown."""
FEW = 24
"""Checkpoints and evaluations of which each has its own line."""


@dataclass(frozen=True, slots=True)
class Line:
    """What happened at one moment.

    Attributes:
        tone: `bad`, `good`, `calm`: how it is coloured.
        kind: in a word or two.
    """

    time_s: float
    tone: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Told:
    """The lines, and what was left out, in words."""

    lines: list[Line]
    left_out: list[str]


def told(past: Past) -> Told:
    """Return what happened."""
    found, left_out = _tries(past), []
    for each in past.tries:
        found += [line for event in each.events if (line := _of_driver(event)) is not None]
    routine = {"eval": 0, "checkpoint": 0}
    for event in past.record.events:
        if event["kind"] in routine:
            routine[event["kind"]] += 1
    for event in past.record.events:
        if routine.get(event["kind"], 0) <= FEW and (line := _of_record(event)) is not None:
            found.append(line)
    for kind, name in (("checkpoint", "checkpoints"), ("eval", "evaluations")):
        if routine[kind] > FEW:
            left_out.append(f"{routine[kind]:,} {name}")
    found.sort(key=lambda line: line.time_s)
    if len(found) > MOST:
        left_out.insert(0, f"{len(found) - MOST:,} lines in the middle")
        found = [*found[: MOST // 2], *found[-MOST // 2 :]]
    return Told(found, left_out)


def checkpoints(past: Past) -> str:
    """Return in words how often was saved, and what that took; empty: never."""
    saved = [event for event in past.record.events if event["kind"] == "checkpoint"]
    if not saved:
        return ""
    stalls = sorted(event.get("stall_s", 0.0) for event in saved)
    last = saved[-1]
    return (
        f"{len(saved):,} checkpoint{'s' * (len(saved) > 1)}, the last of {size(last.get('bytes', 0))};"
        f" training stood still for {words.duration(stalls[len(stalls) // 2])} each (median),"
        f" {words.duration(stalls[-1])} at most"
    )


def _tries(past: Past) -> list[Line]:
    """When each try began, and how it ended."""
    found = []
    for i, each in enumerate(past.tries):
        is_last = i + 1 == len(past.tries)
        name = f"try {i + 1}" if len(past.tries) > 1 else "run"
        found.append(Line(each.begun_s, "calm", "begin", f"{name} begins"))
        kind = past.verdict["kind"] if is_last else each.kind
        if kind != "running":
            tone = "good" if kind == "done" else "bad"
            found.append(Line(each.ended_s, tone, "end", f"{name} ends: {kind}"))
    return found


def _of_driver(event: Mapping[str, Any]) -> Line | None:
    """A line of what the driver kept; what the record tells too is left to that."""
    kind, place = event.get("kind", ""), _place(event)
    reason = " ".join(str(event.get("reason", "")).split())
    why = f": {WHY.get(reason, reason)}" if reason else ""
    texts: dict[str, tuple[str, str, str]] = {
        "start": ("calm", "workers", f"{event.get('num_workers', '?')} workers are started"),
        "failure": ("bad", "failure", f"{_ranks(event.get('ranks', ()))} failed: {reason}"),
        "restart": (
            "calm",
            "restart",
            f"training again after {words.duration(event.get('seconds', 0.0))}, from step"
            f" {event.get('from', 0)} of {event.get('stage')}",
        ),
        "resize": (
            "calm",
            "resize",
            f"{event.get('num_workers')} workers instead of {event.get('was')}{why}",
        ),
        "again": (
            "calm",
            "workers",
            f"{event.get('num_workers')} workers again{why}",
        ),
        "halved": ("bad", "memory", f"{reason or 'no memory left'}; half the micro-batch from here on"),
        "rolled_back": ("bad", "numbers", f"{reason or place}; back to the last checkpoint"),
        "left": ("calm", "left", f"workers saved and left{place and ' at '}{place}{why}"),
        "stopped": ("bad", "given up", f"{event.get('type')}: {event.get('message')}"),
        "hung": ("bad", "hang", f"workers hung in {place}, and were ended"),
    }
    return Line(event.get("time", 0.0), *texts[kind]) if kind in texts else None


def _of_record(event: Mapping[str, Any]) -> Line | None:
    kind, place = event["kind"], _place(event)
    metrics = "  ".join(f"{name} {words.value(each)}" for name, each in event.get("metrics", {}).items())
    match kind:
        case "stage_begin":
            since = f", after step {event['start']:,}" if event["start"] else ""
            text = f"stage {event['stage']} begins{since}, {event.get('num_workers', '?')} workers"
            return Line(event["time"], "calm", "stage", text)
        case "eval":
            return Line(event["time"], "calm", "evaluation", f"{place}: {metrics}")
        case "after":
            text = f"{event.get('stage')} again, after {event.get('last')}: {metrics}"
            return Line(event["time"], "calm", "evaluation", text)
        case "checkpoint":
            text = (
                f"{place} saved, {size(event.get('bytes', 0))} in {words.duration(event.get('save_s', 0.0))}"
            )
            return Line(event["time"], "calm", "checkpoint", text)
        case "export":
            return Line(event["time"], "good", "export", f"the model of stage {event['stage']} is written")
        case "examples":
            fault = f"; {event['fault']}" if event.get("fault") else ""
            text = f"{event.get('num')} rows of {event.get('stage')} answered, to be looked at{fault}"
            return Line(event["time"], "calm", "answers", text)
        case "skipped":
            return Line(event["time"], "bad", "numbers", f"{place} skipped: {event.get('fault')}")
    return None


def _place(event: Mapping[str, Any]) -> str:
    if not event.get("stage"):
        return ""
    return f"step {event['step']:,} of {event['stage']}" if "step" in event else f"stage {event['stage']}"


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "workers"
    names = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}"
