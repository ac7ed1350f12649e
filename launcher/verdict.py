"""How a run ended: facts to one of a few kinds, with what was seen, what it cost, and what to do next. Pure."""

import errno
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from launcher import errors

Kind = Literal[
    "done",
    "bad input",
    "does not fit",
    "out of GPU memory",
    "out of host memory",
    "worker lost",
    "node lost",
    "preempted",
    "hang",
    "numbers",
    "storage",
    "export",
    "cluster",
    "stopped by the user",
    "bug",
]
STOPPED = 130
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
# Ray's own words about its memory monitor. That of every killed worker names the kernel's OOM killer as one of
# several possible causes, so "OOM" alone says nothing.
_SAYS_NO_MEMORY = ("running low on memory", "OutOfMemoryError")
_SAYS_NODE_IS_GONE = ("node has died", "node died", "node was terminated", "node failure", "NodeDiedError")
_SAYS_PREEMPTED = ("preempted", "AUTOSCALER_DRAIN_PREEMPTION")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run has lost.

    Attributes:
        steps: trained since the last checkpoint, to be trained again.
        seconds: since that checkpoint.
        restarts: of the workers.
        restart_s: from the last step before each of them to the first one after it.
        again: steps that restarts had to train again.
    """

    steps: int = 0
    seconds: float = 0.0
    restarts: int = 0
    restart_s: float = 0.0
    again: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known at the end of a run.

    Attributes:
        error: what ended it; None: nothing did.
        said: what the workers that failed last said, or what Ray said of them, by rank.
        is_lost: whether a process or node of theirs was gone, or a peer's.
        oom_kills: processes that the kernel killed for memory on the run's hosts since it began.
        nodes_gone: nodes of the run that are there no more.
        is_preempted: whether nodes were announced to go.
        seen: evidence in words: last step, rank, host, log, memory.
        cost: what was lost.
        continues: where the same command continues, in words; empty: nowhere.
        log: the file to look at.
        figures: of a run that is done, in words.
    """

    error: BaseException | None
    said: dict[int, str] = field(default_factory=dict)
    is_lost: bool = False
    oom_kills: int = 0
    nodes_gone: int = 0
    is_preempted: bool = False
    seen: tuple[str, ...] = ()
    cost: Cost = Cost()
    continues: str = ""
    log: str = "logs/"
    figures: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run ended."""

    kind: Kind
    exit_code: int
    seen: tuple[str, ...]
    cost: Cost
    next: str
    figures: str = ""

    def lines(self) -> list[str]:
        """Return it as the last lines of the output."""
        first = f"verdict: {self.kind} (exit code {self.exit_code})"
        lost = _cost_in_words(self.cost)
        if self.kind == "done":
            return ["; ".join(each for each in (f"{first}: {self.figures}", lost) if each)]
        seen = [f"  seen: {each}" for each in self.seen]
        return [first, *seen, *([f"  cost: {lost}"] if lost else []), f"  next: {self.next}"]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"seen": list(self.seen)}


def of_json(tree: dict[str, Any]) -> Verdict:
    """Return the verdict that a report holds."""
    cost = Cost(**tree.get("cost", {}))
    return Verdict(
        tree["kind"], tree["exit_code"], tuple(tree["seen"]), cost, tree["next"], tree.get("figures", "")
    )


def judge(facts: Facts) -> Verdict:
    """Return how a run ended."""
    kind = _kind(facts)
    seen = list(facts.seen)
    if facts.oom_kills:
        seen.append(f"the kernel killed {facts.oom_kills} processes for want of memory")
    if facts.nodes_gone:
        seen.append(f"{facts.nodes_gone} of its nodes are gone")
    return Verdict(
        kind, _exit_code(kind, facts.error), tuple(seen), facts.cost, _next(kind, facts), facts.figures
    )


def _kind(facts: Facts) -> Kind:
    error = facts.error
    match error:
        case None:
            return "done"
        case KeyboardInterrupt():
            return "stopped by the user"
        case errors.DoesNotFit():
            return "does not fit"
        case errors.BadInput():
            return "bad input"
        case errors.OutOfMemory():
            return "out of GPU memory" if "GPU memory" in str(error) else "out of host memory"
        case errors.Hang():
            return "hang"
        case errors.NumbersError():
            return "numbers"
        case errors.StorageError():
            return "storage"
        case errors.ExportFailed():
            return "export"
        case errors.ClusterError():
            return "preempted" if facts.is_preempted else "node lost" if facts.nodes_gone else "cluster"
        case errors.TrainingFailed():
            return _of_failed_workers(facts)
        case OSError() if error.errno in _STORAGE:
            return "storage"
        case MemoryError():
            return "out of host memory"
    return "bug"


def _of_failed_workers(facts: Facts) -> Kind:
    """Why workers failed once too often: the cause that says most comes first."""
    said = " ".join(facts.said.values())
    if _says(said, _SAYS_NO_MEMORY):
        return "out of host memory"
    if not facts.is_lost:
        return "bug"
    if facts.oom_kills:
        return "out of host memory"
    if facts.is_preempted or _says(said, _SAYS_PREEMPTED):
        return "preempted"
    if facts.nodes_gone or _says(said, _SAYS_NODE_IS_GONE):
        return "node lost"
    return "worker lost"


def _exit_code(kind: Kind, error: BaseException | None) -> int:
    if kind == "done":
        return 0
    if kind == "stopped by the user":
        return STOPPED
    if kind == "out of host memory":
        return errors.OutOfMemory.exit_code
    if kind == "storage":
        return errors.StorageError.exit_code
    return error.exit_code if isinstance(error, errors.LauncherError) else 1


def _next(kind: Kind, facts: Facts) -> str:
    again = (
        f"the same command continues {facts.continues}" if facts.continues else "start the same command again"
    )
    remedies: dict[Kind, str] = {
        "done": "",
        "bad input": "correct what the error names",
        "does not fit": "choose what the error names; --plan tells more",
        "out of GPU memory": "add --set on_oom=shrink, or what the error names",
        "out of host memory": "fewer workers on each machine, a ds config that offloads less, or more memory",
        "worker lost": f"look at the end of {facts.log}, and at the machine's own log",
        "node lost": "bring the node back, or give fewer --workers (2:8: any number from 2 on)",
        "preempted": "bring nodes, or give --workers as a range (2:8: any number from 2 on)",
        "hang": "look at the stacks in hangs/, at that machine, and at the network",
        "numbers": "look at the samples in bad_batches.jsonl; --set on_nan=skip goes on without such batches",
        "storage": "free space, or mend the storage",
        "export": "look at what the error names; the checkpoint is kept",
        "cluster": "bring nodes, or give fewer --workers",
        "stopped by the user": "",
        "bug": f"report it, with {facts.log} and report.json",
    }
    return "; ".join(each for each in (remedies[kind], "" if kind == "done" else again) if each)


def _cost_in_words(cost: Cost) -> str:
    parts = []
    if cost.steps:
        parts.append(f"{cost.steps:,} steps and {cost.seconds:,.1f} s since the last checkpoint")
    if cost.restarts:
        again = f", {cost.again:,} steps trained again" if cost.again else ""
        parts.append(f"{cost.restarts} restarts of the workers, {cost.restart_s:,.0f} s{again}")
    return "; ".join(parts)


def _says(text: str, words: tuple[str, ...]) -> bool:
    return any(each in text for each in words)
