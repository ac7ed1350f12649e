"""What is computed again in the backward, so that it need not be kept: whole layers, and tiles of their networks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launcher.errors import ModelError

# How Llama's family names the layers of a feed-forward network, which takes each token by itself.
_NETWORK = {"gate_proj", "up_proj", "down_proj"}
# Torch's operations that `keeps_products` keeps.
_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_varlen_attn",
    "attend_within",
}


def turn_on(model: Any, *, keeps_products: bool = False) -> None:
    """Let a transformers model compute its layers' activations again in the backward.

    Args:
        model: the model.
        keeps_products: keep the results of matrix products and of attention, and compute the rest again: norms,
            activation functions, rotations and sums, which are cheap and take about half of the memory.

    Raises:
        ModelError: its code has no place for that.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot compute activations again: leave activation_checkpointing out"
        )
    how: dict[str, Any] = {"use_reentrant": False}
    if keeps_products:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operation.name().split("::")[-1].split(".")[0] in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def tile(model: nn.Module, tokens: int) -> None:
    """Let a model's feed-forward networks take so many tokens at a time, and keep no more than these hold.

    As DeepSpeed's TiledMLP, but tiles are checkpoints of their own: weights get one gradient, not one for each tile,
    so ZeRO needs no telling, and ranks may have different numbers of tiles. Models that name their layers
    in other ways are left as they are.

    Args:
        model: with networks of gate_proj, up_proj and down_proj.
        tokens: of a tile.
    """
    for module in model.modules():
        if {name for name, _ in module.named_children()} >= _NETWORK and not _is_tiled(module):
            module.forward = partial(_in_tiles, module.forward, tokens)  # type: ignore[method-assign]


def tiled(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the networks that `tile` changed."""
    return (module for module in model.modules() if _is_tiled(module))


def _is_tiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _in_tiles


def _in_tiles(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """Run a network on (..., tokens, size), in tiles along the tokens of all rows."""
    rows = max(1, hidden.shape[:-2].numel())
    pieces = hidden.split(max(1, tokens // rows), dim=-2)
    if len(pieces) == 1:
        return forward(hidden)
    return torch.cat([checkpoint(forward, piece, use_reentrant=False) for piece in pieces], dim=-2)
