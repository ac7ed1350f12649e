"""Is the exported model the one that was trained? Runs in a process that has never seen the training."""

from pathlib import Path
from typing import Any

from launcher import recipe as recipes
from launcher import tasks
from launcher.errors import ExportFailed


def verify_stage(stage_tree: dict[str, Any], folder: str) -> float | ExportFailed:
    """Read a stage's export back and compare it with the probe that the engine left.

    Args:
        stage_tree: the stage as `recipe.dump_stage` gives it.
        folder: the stage's folder in the run directory.

    Returns:
        The largest difference of logits relative to the largest logit; or the error, as a value.
    """
    from launcher.train import export

    task = tasks.create(recipes.Stage.model_validate(stage_tree))
    try:
        return export.verify(Path(folder) / "export", task, Path(folder) / export.PROBE)
    except ExportFailed as error:
        return error
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ExportFailed(f"{folder}/export: cannot be loaded: {first_line}")
