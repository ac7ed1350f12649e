"""Several samples in one sequence: what the model is told so that none sees another, and the proof of it.

A packed micro-batch holds `input_ids`, `labels` and `position_ids`, all int64 of shape (packs, length), and
no attention mask: a sample begins wherever a position is 0, and padding is one more segment. Logits keep
the shape (packs, length, vocabulary) under every attention implementation, so the loss needs no change.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from launcher.errors import ModelError
from launcher.train import varlen

BOUNDS = "bounds"
"""In a micro-batch on its device: what `bounds` returns, where that is known already."""
_REMEDY = "give the stage `batching: bucketed`"
# Layers, as transformers names them, that carry a state along the pack and take no mask for it.
_RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


def check(model: Any) -> None:
    """Refuse a model that cannot be told where samples begin.

    Args:
        model: a transformers model, not DeepSpeed's engine around it.

    Raises:
        ModelError: it takes no position_ids, has recurrent layers or ALiBi, or its attention takes neither
            a mask nor lengths.
    """
    name, attention = type(model).__name__, attention_of(model)
    parameters = inspect.signature(type(model).forward).parameters
    if "position_ids" not in parameters:
        raise ModelError(f"{name} takes no position_ids, so samples cannot be packed for it: {_REMEDY}")
    if kinds := _recurrent(model):
        raise ModelError(f"{name} has {min(kinds)} layers, so samples cannot be packed for it: {_REMEDY}")
    # Its biases are made from a mask of two dimensions, which cannot tell samples apart.
    if getattr(_text_config(model), "alibi", False):
        raise ModelError(f"{name} uses ALiBi, so samples cannot be packed for it: {_REMEDY}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if _is_flash(attention):
        if not (takes_any or "cu_seq_lens_q" in parameters):
            raise ModelError(
                f"{name} passes no sample lengths on to {attention}: {_REMEDY}, or model.attention: sdpa"
            )
    elif attention not in ("eager", "sdpa", "flex_attention", varlen.NAME):
        raise ModelError(f"{name}: samples cannot be packed for attention {attention!r}: {_REMEDY}")


def inputs(model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward that keep the samples of each pack apart.

    The flash_attention path is checked on the CPU only for its arguments, not run.

    Args:
        model: one that passed `check`.
        tensors: a packed micro-batch, on the model's device.
    """
    positions, attention = tensors["position_ids"], attention_of(model)
    # With a cache, transformers stops looking for samples in the position_ids.
    given = {"input_ids": tensors["input_ids"], "position_ids": positions, "use_cache": False}
    if attention == varlen.NAME or _is_flash(attention):
        told = tensors[BOUNDS] if BOUNDS in tensors else bounds(positions, positions.device)
        return given | ({"attention_mask": told} if attention == varlen.NAME else _lengths(told))
    mask = _mask(model, positions)
    return given if mask is None else given | {"attention_mask": mask}


def bounds(positions: Tensor, device: torch.device) -> Tensor:
    """Return where segments begin and end, all packs laid end to end, as `varlen.as_mask` has it.

    Args:
        positions: int64 (packs, length), on the host where `device` is a GPU: else that would be waited for.
        device: where the bounds are wanted.
    """
    starts = (positions == 0).flatten().nonzero().flatten().to(torch.int32)
    found = F.pad(starts, (0, 1), value=positions.numel())
    longest = int(found.diff().max())
    return varlen.as_mask(found.to(device, non_blocking=True), longest)


@torch.no_grad()
def self_test(model: Any, forward: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> None:
    """Prove on a micro-batch that a sample's logits depend on its own tokens and on no other sample's.

    Every second segment's tokens are changed, then the others': the rest may not move, before or after
    it. Runs `forward` three times whatever the data, so that ranks can meet in its collectives.

    Args:
        model: the transformers model behind `forward`; its dropout is off meanwhile.
        forward: takes a packed micro-batch to logits, as training does.
        tensors: a packed micro-batch; a pack with a single sample is cut in two.

    Raises:
        ModelError: samples of a pack see each other, or the logits prove nothing.
    """
    check(model)
    probe = _with_neighbours(tensors)
    ids, positions = probe["input_ids"], probe["position_ids"]
    is_odd = (positions == 0).cumsum(-1) % 2 == 1
    # A neighbour in the vocabulary is always another token that exists.
    changed = torch.where(ids > 0, ids - 1, 1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        base = forward(probe)
        moved = [
            _movement(base, forward(probe | {"input_ids": torch.where(chosen, changed, ids)}))
            for chosen in (is_odd, ~is_odd)
        ]
    finally:
        for module, mode in modes:
            module.training = mode
    own = torch.where(is_odd, *moved)
    # The second change is of the even segments: what it moves in odd ones crossed a boundary.
    others = torch.where(is_odd, *reversed(moved))
    # In every pack, or the still ones prove nothing.
    _judge(model, float(own.mean(-1).min()), float(others.max()), _tolerance(model, base))


def _judge(model: Any, own: float, others: float, tolerance: float) -> None:
    name, attention = type(model).__name__, attention_of(model)
    # NaN compares false, so what is asked is what has to hold.
    if not own + others < float("inf"):
        raise ModelError(f"{name}: its logits are not finite, so packed samples cannot be tested: {_REMEDY}")
    if not own > tolerance:
        raise ModelError(
            f"{name}: its logits do not depend on its tokens, so packed samples cannot be tested: {_REMEDY}"
        )
    if not others <= tolerance:
        raise ModelError(
            f"{name} with {attention} attention lets the samples of a pack see each other (logits moved by"
            f" {others:.1e} of their size, {tolerance:.1e} is noise): {_REMEDY}, or try another model.attention"
        )


def _movement(before: Tensor, after: Tensor) -> Tensor:
    """Return for each token (packs, length) how far its logits moved, against the size of all logits."""
    # Pack by pack, since logits in fp32 can be the largest tensors of a run.
    moved = torch.stack(
        [(b.float() - a.float()).square().mean(-1) for a, b in zip(before, after, strict=True)]
    )
    size = torch.stack([a.float().square().mean() for a in before]).mean()
    return (moved / size).sqrt()


def _tolerance(model: Any, logits: Tensor) -> float:
    """Return the movement that is noise.

    What is masked weighs exactly 0, so mostly nothing moves at all; but experts may add up in another
    order, which costs the last digits. A sample's first token that sees other tokens besides itself
    moves by about its own size. Between the two lies half the digits of the least precise dtype.
    """
    return max(torch.finfo(dtype).eps for dtype in (model.dtype, logits.dtype)) ** 0.5


def _with_neighbours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a micro-batch whose packs all have at least two segments."""
    positions = tensors["position_ids"]
    length = positions.shape[1]
    columns = torch.arange(length, device=positions.device)
    halves = torch.where(columns < length // 2, columns, columns - length // 2)
    is_single = (positions == 0).sum(-1, keepdim=True) < 2
    cut = {name: each for name, each in tensors.items() if name != BOUNDS}
    return cut | {"position_ids": torch.where(is_single, halves, positions)}


def _lengths(bounds: Tensor) -> dict[str, Any]:
    """Return the segments' bounds as transformers hands them to flash attention."""
    starts, longest = bounds[0, 0, 0], bounds.shape[2]
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _mask(model: Any, positions: Tensor) -> Any:
    """Return the mask of 4 dimensions that the attention wants, block-diagonal and causal; None: causal.

    transformers makes it, as for `generate`: it knows the dtype of each implementation, and windows and
    chunks of attention. A model with several kinds of layers takes a mask for each kind, in a dict.
    """
    # Only shape, dtype and device of the embeddings are looked at.
    like = torch.empty((*positions.shape, 0), dtype=model.dtype, device=positions.device)
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    masks = make(
        config=model.config,
        inputs_embeds=like,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    # Models with one kind of layer take a plain mask, whether or not they would take a dict.
    return next(iter(masks.values())) if isinstance(masks, dict) and len(masks) == 1 else masks


def carries_state(model: Any) -> bool:
    """Whether a token's result depends on those before it in other ways than by attention and its position."""
    return bool(_recurrent(model)) or bool(getattr(_text_config(model), "alibi", False))


def _recurrent(model: Any) -> set[str]:
    return _RECURRENT & set(getattr(_text_config(model), "layer_types", None) or ())


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def attention_of(model: Any) -> str:
    """Return the name of a model's attention implementation."""
    return _text_config(model)._attn_implementation or "eager"


def _is_flash(attention: str) -> bool:
    # transformers names kernels of the hub by their repository, e.g. kernels-community/flash-attn2.
    return "flash" in attention
