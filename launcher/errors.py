"""What can go wrong: one type for each remedy, each with the exit code of the process that meets it.

A message is one line for the user: what is wrong, where (file, key, row), what to do. Errors hold
nothing but their message, so they cross process borders unchanged.
"""

import difflib
import sys
from collections.abc import Iterable


def tell(error: Exception) -> int:
    """Print what ended a command, in one line; return the command's exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, LauncherError) else BadInput.exit_code


class LauncherError(Exception):
    """The base of every error that the launcher raises on purpose."""

    exit_code = 1


class BadInput(LauncherError):
    """Something the user wrote or supplied cannot be used; nothing was started or written."""

    exit_code = 2


class RecipeError(BadInput):
    """The recipe (or a `--set`) is wrong: an unknown key, a bad value, two keys that contradict."""


class DsConfigError(BadInput):
    """The DeepSpeed config is wrong, or contradicts the recipe."""


class DataError(BadInput):
    """A data set is missing, unreadable, empty, or lacks what the task needs."""


class ModelError(BadInput):
    """The model or tokenizer cannot be used as the recipe asks."""


class DoesNotFit(BadInput):
    """The run needs more memory than its machines have."""


class RunExists(BadInput):
    """The run's name belongs to another recipe, or its directory cannot be continued."""


class ClusterError(LauncherError):
    """The cluster cannot be reached, or cannot hold the workers that were asked for."""

    exit_code = 3


class OutOfMemory(LauncherError):
    """A device or host had no memory left in training.

    Attributes:
        stage: in which.
        can_halve: whether its micro-batch can be smaller.
    """

    exit_code = 7

    def __init__(self, message: str, stage: str = "", can_halve: bool = False) -> None:
        super().__init__(message)
        self.stage, self.can_halve = stage, can_halve


class TrainingFailed(LauncherError):
    """Workers failed more often than the recipe allows."""

    exit_code = 4


class ExportFailed(LauncherError):
    """The exported model is not the model that was trained; the checkpoint is kept."""

    exit_code = 5


class StorageError(LauncherError):
    """The run root cannot be written: the disk is full, or may not be written to."""

    exit_code = 6


class NumbersError(LauncherError):
    """A loss or a gradient was no number, or far from those before; nothing was updated by it.

    Attributes:
        stage, step: where.
    """

    exit_code = 8

    def __init__(self, message: str, stage: str = "", step: int = 0) -> None:
        super().__init__(message)
        self.stage, self.step = stage, step


class Hang(LauncherError):
    """Workers stood still again and again without a step in between; the message names rank, host and phase."""

    exit_code = 9


def refused_token(where: str) -> ClusterError:
    """Return the error for a cluster that wants another token than it was given."""
    return ClusterError(
        f"{where} does not take the token: export RAY_AUTH_MODE=token, and the cluster's token by"
        " RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
