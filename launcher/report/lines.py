"""Events as lines of text: what a log shows, and what scrolls by above the panel. Pure."""

from collections.abc import Callable

from launcher.report import words
from launcher.report.forecast import size
from launcher.report.memory import LITTLE
from launcher.report.progress import Progress
from launcher.report.record import Event


def of(event: Event) -> str:
    """Return the lines of an event; empty: it is shown otherwise, or not at all."""
    line = _LINES.get(event["kind"])
    return line(event) if line is not None else ""


def step(progress: Progress, tokens_share: float | None, data_share: float | None) -> str:
    """Return the line of the last step.

    Args:
        progress: of the run.
        tokens_share: of padding, in the steps that were seen.
        data_share: of waiting for data, in their time.
    """
    event = progress.last
    line = (
        f"{event['stage']}  step {event['step']}/{progress.num_steps}  loss {event['loss']:.4f}"
        f"  lr {event['lr']:.2e}"
    )
    per_step_s, left_s = progress.per_step_s(), progress.stage_left_s()
    if per_step_s is not None and left_s is not None:
        line += f"  {event['samples'] / per_step_s:,.0f} samples/s"
        line += f"  {event['tokens'] / per_step_s:,.0f} tokens/s"
        line += f"  padding {tokens_share or 0:.1%}"
        line += f"  data wait {data_share or 0:.1%}"
        mfu = progress.mfu()
        line += "" if mfu is None else f"  MFU {mfu:.1%}"
        line += f"  {duration(left_s)} left"
    return line


def usage(progress: Progress, now_s: float) -> str:
    """Return the line of what is told now and then: memory, saving, the run's time."""
    parts = [memory(progress), *next_checkpoint(progress, now_s)]
    share, left_s = progress.checkpoint_share(), progress.run_left_s()
    if share:
        parts.append(f"checkpoints took {share:.1%} of the time")
    if left_s is not None and sum(not each.is_done for each in progress.stages.values()) > 1:
        parts.append(f"about {duration(left_s)} left of the run")
    return f"{progress.stage}: " + "; ".join(part for part in parts if part)


def memory(progress: Progress) -> str:
    """Return what a worker has used at the peak, and what was predicted, where that says something."""
    predicted = progress.stages[progress.stage].memory if progress.stage in progress.stages else {}
    parts = []
    for place, name in (("device", "GPU"), ("host", "host")):
        used, said = progress.used.get(place), predicted.get(place)
        if used:
            # Of the host the system tells whole processes: beside what libraries take, little tells nothing.
            of = f" of {size(said)} predicted" if said and (place == "device" or said >= LITTLE) else ""
            parts.append(f"{name} {size(used)}{of}")
    return f"memory of a worker: {', '.join(parts)}" if parts else ""


def next_checkpoint(progress: Progress, now_s: float) -> list[str]:
    """Return when the next checkpoint is, if it is known."""
    due = progress.next_checkpoint(now_s)
    if due is None:
        return []
    at = f" at step {due.step:,}" if due.step is not None else ""
    return [f"next checkpoint{at}" + ("" if due.in_s is None else f" in {duration(due.in_s)}")]


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def preparation(event: Event) -> str:
    """Return how far the preparation of a store is."""
    line = f"preparing {event['store']}: {event['done']}/{event['chunks']} chunks"
    line += f", {event['tokens']:,} tokens"
    if event["chunks"] > 1 and event["seconds"]:
        line += f", {event['tokens'] / event['seconds']:,.0f} tokens/s"
    return line + (f", {event['bad']:,} bad rows" if event["bad"] else "")


def _stage_begin(event: Event) -> str:
    since = f", continuing after step {event['start']}" if event["start"] else ""
    return (
        f"stage {event['stage']}: {event['num_steps']} steps of {event['units_per_step']}"
        f" {event['unit']}{since}"
    )


def _checkpoint(event: Event) -> str:
    stall = f", training stood still for {event['stall_s']:.2f} s"
    return f"{event['stage']}: checkpoint of step {event['step']}, {size(event['bytes'])}{stall}"


def _left(event: Event) -> str:
    at = f"step {event['step']} of stage {event['stage']}" if event["stage"] else "the end of a stage"
    return f"saved at {at}"


def _rolled_back(event: Event) -> str:
    past = f"going on from the last checkpoint, and past step {event['step']} (on_nan: rollback)"
    return f"{event['reason']}\n{past}"


_HALVED = "going on from the last checkpoint with half the micro-batch (on_oom: shrink)"
_LINES: dict[str, Callable[[Event], str]] = {
    "stage_begin": _stage_begin,
    "preparation_failed": lambda e: f"the preparation of the data has stopped: {e['reason']}",
    "eval": lambda e: f"{e['stage']}  step {e['step']}  eval: {words.metrics(e['metrics'])}",
    "after": lambda e: f"{e['stage']}  again, after {e['last']}: {words.metrics(e['metrics'])}",
    "export": lambda e: f"stage {e['stage']}: model written to {e['path']}",
    "checkpoint": _checkpoint,
    "left": _left,
    "halved": lambda e: f"{e['reason']}\n{_HALVED}",
    "hung": lambda e: "they were ended; going on from the last checkpoint",
    "skipped": lambda e: f"{e['stage']}  step {e['step']} skipped: {e['fault']}",
    "rolled_back": _rolled_back,
    "failure": lambda e: f"a worker failed ({e['reason']}); going on from the last checkpoint",
    "restart": lambda e: (
        f"trained on {e['seconds']:,.1f} s after the last step before (stage {e['stage']}, step {e['from']})"
    ),
    "resize": lambda e: f"going on with {e['num_workers']} workers, instead of {e['was']}",
}
