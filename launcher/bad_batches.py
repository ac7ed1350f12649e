"""What a run keeps of the steps whose numbers went wrong: which to pass by, and their samples."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import storage

if TYPE_CHECKING:
    from launcher.assembly import Context
    from launcher.train.numbers import Guard

PASSED, LIST = "skipped.json", "bad_batches.jsonl"
"""In the run directory: by stage, the steps to pass by; of each step that went wrong, its samples."""


def guard(
    engine: Any,
    context: "Context",
    *,
    stage: str,
    parts: Sequence[str],
    before_error: Callable[[int], None],
) -> "Guard":
    """Return the engine of a stage with a guard around it.

    Args:
        engine: makes the steps.
        context: of this rank.
        stage: its name.
        parts: their names, in the order of their batches.
        before_error: is called with the step that ends the run.
    """
    from launcher.train import numbers

    passed = (storage.read_json(context.run_dir / PASSED) or {}).get(stage, [])
    return numbers.Guard(
        engine,
        stage=stage,
        names=list(parts),
        on_nan=context.recipe.on_nan,
        spike=context.recipe.spike,
        passed=frozenset(passed),
        write=_writer(context.run_dir / LIST) if context.rank == 0 else _nothing,
        before_error=before_error,
    )


def pass_by(run_dir: Path, stage: str, step: int) -> None:
    """Remember that a step is not to be made when the run comes to it again."""
    known = storage.read_json(run_dir / PASSED) or {}
    known[stage] = sorted({*known.get(stage, []), step})
    storage.write_json(run_dir / PASSED, known)


def _writer(path: Path) -> Callable[[dict[str, Any]], None]:
    def write(told: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **told}) + "\n")

    return write


def _nothing(told: dict[str, Any]) -> None:
    pass
