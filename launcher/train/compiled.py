"""torch.compile of what is trained, and of nothing else."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P, _R = ParamSpec("_P"), TypeVar("_R")


def turn_on(model: Any) -> None:
    """Compile a transformers model's trunk when it first trains, for batches of all shapes.

    What comes after it stays as it is: the loss of next tokens takes the place of the output layer's forward.
    """
    trunk = getattr(model, model.base_model_prefix, model)
    trunk.compile(dynamic=True)


def aside_in(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function leave compiled code aside: evaluation and generation would have it made again for themselves."""

    @wraps(function)
    def without(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return without
