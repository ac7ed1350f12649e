"""What to do when workers fail: a decision, which the driver carries out. Pure."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from launcher.errors import Hang, LauncherError, NumbersError, OutOfMemory, TrainingFailed


@dataclass(frozen=True, slots=True)
class Retry:
    """Start the workers again; `reason` is what failed, `is_lost` whether a process or node is gone."""

    reason: str
    is_lost: bool = True


@dataclass(frozen=True, slots=True)
class Halve:
    """Start them again with half the micro-batch in a stage; `reason` says what was used and predicted."""

    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """Start them again from the last checkpoint, and pass a step by; `reason` says what was wrong with it."""

    stage: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run with this error."""

    error: Exception


Decision = Retry | Halve | Rollback | Stop

_GUESSES = ("Some common causes include", "There are some potential root causes")
_SAYS_PEER_IS_GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


MOST_ROLLBACKS = 10
"""More than so many bad batches in one run are not the batches' fault."""


class Policy:
    """Decides about one failure after another.

    An error with a remedy for the user ends the run; another exception of our own process ends it when it
    comes twice in a row, since a third time would be the same. Lost processes and nodes have a budget. Memory
    that ran out has none: halving ends at one sample. Hangs have one of their own, as large, which a new step fills up.
    """

    def __init__(
        self,
        max_failures: int,
        on_oom: Literal["stop", "shrink"],
        logs: str,
        on_nan: Literal["stop", "skip", "rollback"] = "stop",
    ) -> None:
        self.max_failures, self.on_oom, self.logs, self.on_nan = max_failures, on_oom, logs, on_nan
        self.num_failures, self.num_rollbacks, self.said = 0, 0, ""
        self.num_hangs, self.hung_at = 0, ("", -1)

    def decide(self, failures: Mapping[int, Exception], lost: Set[int]) -> Decision:
        """Return what to do.

        Args:
            failures: by rank: what our own code raised, or what Ray says of a process or node that is gone.
            lost: the ranks of the latter.
        """
        # One rank without memory makes the others fail in their collectives: it is the cause.
        own = [each for each in failures.values() if isinstance(each, LauncherError)]
        own.sort(key=lambda each: not isinstance(each, OutOfMemory))
        if own:
            first = own[0]
            if isinstance(first, OutOfMemory) and self.on_oom == "shrink" and first.can_halve:
                return Halve(first.stage, str(first))
            if isinstance(first, NumbersError) and self.on_nan == "rollback":
                self.num_rollbacks += 1
                if self.num_rollbacks <= MOST_ROLLBACKS:
                    return Rollback(first.stage, first.step, str(first))
            return Stop(first)
        reason = last_line(next(iter(failures.values())))
        is_lost = is_about_loss(failures, lost)
        self.num_failures += 1
        if self.num_failures > self.max_failures or (not is_lost and reason == self.said):
            is_spent = self.num_failures > self.max_failures
            often = (
                f"more than {self.max_failures} times (max_failures)" if is_spent else "twice in the same way"
            )
            return Stop(
                TrainingFailed(
                    f"workers failed {often}; the last error: {reason} (logs: {self.logs})."
                    " The same command continues from the last checkpoint"
                )
            )
        self.said = "" if is_lost else reason
        return Retry(reason, is_lost)

    def hung(self, message: str, stage: str, step: int) -> Retry | Stop:
        """Return what to do about workers that were ended because they hung.

        Args:
            message: which rank, where, with the file of its stacks.
            stage, step: how far they had come.
        """
        # Steps made again since a checkpoint are not new: a step that always hangs would never end the run.
        is_further = stage != self.hung_at[0] or step > self.hung_at[1]
        self.num_hangs = 1 if is_further else self.num_hangs + 1
        self.hung_at = (stage, step) if is_further else self.hung_at
        if self.num_hangs <= self.max_failures:
            return Retry(message)
        times = "once" if self.num_hangs == 1 else f"{self.num_hangs} times"
        return Stop(
            Hang(
                f"the workers hung {times} without a new step (max_failures: {self.max_failures}):"
                f" {message}. The same command continues from the last checkpoint"
            )
        )


def is_about_loss(failures: Mapping[int, Exception], lost: Set[int]) -> bool:
    """Return whether a process or node is gone, by Ray's word or a peer's."""
    return bool(lost) or any(says_peer_is_gone(str(each)) for each in failures.values())


def says_peer_is_gone(text: str) -> bool:
    """Return whether a collective failed because another rank was gone, of which Ray may hear a moment later."""
    return any(words in text for words in _SAYS_PEER_IS_GONE)


def last_line(error: BaseException) -> str:
    """Return what an error says at its end, without what Ray guesses of every worker that is gone."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    for guess in _GUESSES:
        said = said.partition(guess)[0].strip()
    return said[:300]
