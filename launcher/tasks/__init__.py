"""What a row means: one module for each task, imported only when a stage names it."""

import importlib
from typing import TYPE_CHECKING

from launcher import recipe

if TYPE_CHECKING:
    from launcher.tasks.base import Task

_CLASSES = {
    "text-classification": ("launcher.tasks.text_classification", "TextClassification"),
    "token-classification": ("launcher.tasks.token_classification", "TokenClassification"),
    "question-answering": ("launcher.tasks.question_answering", "QuestionAnswering"),
    "translation": ("launcher.tasks.translation", "Translation"),
    "causal-lm": ("launcher.tasks.causal_lm", "CausalLM"),
}


def create(stage: recipe.Stage) -> "Task":
    """Return the stage's task."""
    module, name = _CLASSES[stage.task]
    task: Task = getattr(importlib.import_module(module), name)(stage)
    return task
