"""Activation checkpointing: each layer keeps its input alone, and computes the rest again in the backward."""

from typing import Any

from launcher.errors import ModelError


def turn_on(model: Any) -> None:
    """Let a transformers model compute its layers' activations again in the backward.

    Raises:
        ModelError: its code has no place for that.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot compute activations again: leave activation_checkpointing out"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
