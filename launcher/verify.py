"""Is the exported model the one that was trained? Runs in a process that has never seen the training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import lean, tasks
from launcher import recipe as recipes
from launcher.errors import ExportFailed


@dataclass(frozen=True, slots=True)
class Verified:
    """A stage's export that was read back.

    Attributes:
        difference: the largest of logits relative to the largest logit.
        metric: the one that judges the stage.
        notes: by metric how it is defined, where that is not clear from its name.
    """

    difference: float
    metric: str
    notes: dict[str, str]


def verify_stage(stage_tree: dict[str, Any], folder: str) -> Verified | ExportFailed:
    """Read a stage's export back and compare it with the probe that the engine left.

    Args:
        stage_tree: the stage as `recipe.dump_stage` gives it.
        folder: the stage's folder in the run directory.

    Returns:
        What was found; or the error, as a value.
    """
    with lean.imports():
        from launcher.train import export

        task = tasks.create(recipes.Stage.model_validate(stage_tree))
    try:
        difference = export.verify(Path(folder) / "export", task, Path(folder) / export.PROBE)
        return Verified(difference, task.metric, task.notes())
    except ExportFailed as error:
        return error
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ExportFailed(f"{folder}/export: cannot be loaded: {first_line}")
