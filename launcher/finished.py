"""What a run has left: its recipe, and the model that one of its stages trained. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from launcher import recipe as recipes
from launcher.errors import BadInput, ModelError, nearest
from launcher.recipe import Recipe, Stage

if TYPE_CHECKING:
    from launcher.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage whose model is exported.

    Attributes:
        recipe: the run's.
        stage: the stage.
        directory: the stage's in the run directory.
        export: the model's.
    """

    recipe: Recipe
    stage: Stage
    directory: Path
    export: Path


def find(run_dir: Path, stage_name: str | None) -> Finished:
    """Return a stage of a run; the last one if no name is given.

    Raises:
        BadInput: there is no such run or stage, or the stage is not finished.
    """
    recipe = _recipe(run_dir)
    stage = _stage(recipe, stage_name, run_dir)
    directory = run_dir.absolute() / "stages" / stage.name
    export = directory / "export"
    if not (export / "config.json").is_file():
        raise BadInput(f"{export}: no exported model yet: let stage {stage.name} finish first")
    return Finished(recipe, stage, directory, export)


def load(finished: Finished, task: "Task") -> tuple[Any, Any, Any]:
    """Load the model, on a GPU if there is one, the task's own parameters beside it (or None), the tokenizer.

    Raises:
        ModelError: something cannot be loaded.
    """
    # Imported late: --help and wrong arguments need no torch.
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked, export = finished.recipe.model, finished.export
    trust = asked.trust_remote_code is not None
    # What the run computed with, to compute the same; but the run may have had a GPU.
    attention = asked.attention if device == "cuda" or asked.attention in ("eager", "sdpa") else "auto"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=trust)
        model = getattr(transformers, task.auto_model).from_pretrained(
            export,
            dtype="auto",
            trust_remote_code=trust,
            attn_implementation=None if attention == "auto" else attention,
        )
        extra = task.load_extra(export)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{export}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    extra = None if extra is None else extra.eval().to(device)
    return model.eval().to(device), extra, tokenizer


def _recipe(run_dir: Path) -> Recipe:
    path = run_dir / "recipe.yaml"
    try:
        return recipes.parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError:
        raise BadInput(f"{path}: cannot be read: give the directory of a run") from None
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: is no recipe that a run wrote: {reason}") from None


def _stage(recipe: Recipe, name: str | None, run_dir: Path) -> Stage:
    stages = {stage.name: stage for stage in recipe.stages}
    if name is None:
        return recipe.stages[-1]
    if name not in stages:
        raise BadInput(
            f'--stage: {run_dir} has no stage "{name}"{nearest(name, stages)}; it has: {", ".join(stages)}'
        )
    return stages[name]
