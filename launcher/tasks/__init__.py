"""What a row means: one module for each task, imported only when a stage names it.

`text-classification` is the class `TextClassification` of `text_classification.py`: a name says where its task is.
"""

import importlib
from typing import TYPE_CHECKING

from launcher import recipe

if TYPE_CHECKING:
    from launcher.tasks.base import Task


def create(stage: recipe.Stage) -> "Task":
    """Return the stage's task."""
    module = importlib.import_module(f"launcher.tasks.{stage.task.replace('-', '_')}")
    name = stage.task.replace("-", "")
    # In a class's name letters are large as its author likes: CausalLM.
    found = next(each for each in vars(module) if each.lower() == name)
    task: Task = getattr(module, found)(stage)
    return task
