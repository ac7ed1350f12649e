"""Attention over packs that computes nothing between samples: each attends within its own bounds, without a mask.

A mask of a whole pack costs length x length, and most of it says no. On GPUs torch's own flash attention takes the
bounds (`torch.nn.attention.varlen`; it has not been run here); on CPUs each sample is an attention of its own.

A model hands the bounds to its layers in the place of a mask of four dimensions, which transformers takes as it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "launcher-varlen"
# What a model's config calls things that bounds alone do not tell.
_BEYOND = ("attn_logit_softcapping", "attention_chunk_size", "alibi")
_HALF = (torch.bfloat16, torch.float16)


def turn_on(model: Any, device: torch.device) -> None:
    """Let a model that would take a mask over whole packs take bounds, where its attention allows that."""
    if not _suits(model, device):
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def as_mask(bounds: Tensor, longest: int) -> Tensor:
    """Return bounds as a model hands them on: a view of four dimensions, the third as long as the longest sample.

    So that number is known on the host, and no GPU has to be waited for.

    Args:
        bounds: int32 (samples + 1,): where each sample of a micro-batch begins, its packs laid end to end, and the end.
        longest: tokens of the longest.
    """
    return bounds.expand(1, 1, longest, -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within bounds; without them (in evaluation, say) as sdpa does.

    Args:
        module: the attention layer.
        query, key, value: (packs, heads, length, size); keys and values perhaps of fewer heads.
        attention_mask: from `as_mask`; or a mask, or None.
        dropout, scaling: as of sdpa.
        **kwargs: of transformers.

    Returns:
        (packs, length, heads, size), and None.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packs, _, length, _ = query.shape
    # Packs end to end: (tokens, heads, size).
    flat = [each.transpose(1, 2).reshape(packs * length, *each.shape[1::2]) for each in (query, key, value)]
    bounds, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen_attn(
            *flat, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
        )
        assert isinstance(found, Tensor)
        return found.view(packs, length, *found.shape[1:]), None
    groups = flat[0].shape[1] // flat[1].shape[1]
    if groups > 1:
        flat[1:] = [each.repeat_interleave(groups, dim=1) for each in flat[1:]]
    if dropout:
        found = torch.cat(_each(flat, bounds, dropout, scaling))
    else:
        found, _ = _within(*flat, bounds, scaling)
    return found.view(packs, length, *found.shape[1:]), None


def _each(flat: list[Tensor], bounds: Tensor, dropout: float, scaling: float | None) -> list[Tensor]:
    """Attend sample by sample, with dropout, which torch's fused kernel lacks; return each one's (tokens, heads, size)."""
    lengths = bounds.diff().tolist()
    # Split, whose backward joins the pieces once: slices would each make a gradient as large as the whole.
    pieces = zip(*(each.split(lengths) for each in flat), strict=True)
    return [
        F.scaled_dot_product_attention(
            *(each.transpose(0, 1).unsqueeze(0) for each in piece),
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        .squeeze(0)
        .transpose(0, 1)
        for piece in pieces
    ]


# One operation for all samples, so that a compiled model is not broken up at their number.
@torch.library.custom_op("launcher::attend_within", mutates_args=())
def _within(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend on a CPU: (tokens, heads, size) each; return as much, and the logarithm of each softmax's sum."""
    result, sums = _room(query)
    for piece in _pieces(bounds):
        given = (_alone(each[piece]) for each in (query, key, value))
        found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *given, 0.0, True, scale=scale
        )
        result[piece], sums[piece] = found[0].transpose(0, 1), total[0].transpose(0, 1)
    return result, sums


@_within.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _room(query)


def _room(query: Tensor) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(*query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query), sums


@torch.library.custom_op("launcher::attend_within_backward", mutates_args=())
def _within_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    result: Tensor,
    sums: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    found = tuple(torch.empty_like(each) for each in (query, key, value))
    for piece in _pieces(bounds):
        given = (_alone(each[piece]) for each in (gradient, query, key, value, result, sums))
        slopes = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, True, scale=scale
        )
        for whole, slope in zip(found, slopes, strict=True):
            whole[piece] = slope[0].transpose(0, 1)
    return found


@_within_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    result: Tensor,
    sums: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, ctx.scale = inputs
    ctx.save_for_backward(*given, *output)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
    return *_within_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


_within.register_autograd(_back, setup_context=_keep)


def _pieces(bounds: Tensor) -> list[slice]:
    starts = bounds.tolist()
    return [slice(start, end) for start, end in pairwise(starts)]


def _alone(piece: Tensor) -> Tensor:
    """(tokens, heads, ...) as a batch of one: (1, heads, tokens, ...)."""
    return piece.transpose(0, 1).unsqueeze(0)


def _suits(model: Any, device: torch.device) -> bool:
    """Whether a model's attention is plain: causal, over everything before, by transformers' interface."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    is_plain = kinds == {"full_attention"} and (not windows or "layer_types" in vars(config))
    is_plain = is_plain and not any(getattr(config, name, None) for name in _BEYOND)
    # Latent attention has values of another size than keys, which no kernel here takes.
    is_plain = is_plain and not any(
        getattr(config, name, None) for name in ("v_head_dim", "qk_rope_head_dim")
    )
    if not (is_plain and config._attn_implementation == "sdpa" and model._supports_attention_backend):
        return False
    if device.type != "cuda":
        return True
    drops = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        not drops
        and size <= 256
        and model.dtype in _HALF
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
