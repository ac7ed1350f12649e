"""The loss of next tokens without all logits at once: of a language model they are the largest tensors.

A large vocabulary makes them so: 8,192 tokens x 128,000 words take 4 GB in fp32, and the loss holds them twice.
Here the output layer works through tiles of tokens. The loss is a sum over tokens, so each tile's gradients are
known with the tile itself: they are taken at once, and no logits are left for the backward.

DeepSpeed has the same idea (`sequence_tiled_compute`), which calls the output layer once a tile: under ZeRO-3 that
gathers its weights as often, on all ranks alike. Here it is called once, whatever the tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""By device, the logits of a tile in fp32, at most. Of a CPU they stay in its cache, which is quicker than whole
logits in any case; a GPU is quickest with whole ones, so there tiles only keep them from growing."""
FEWEST = 128
"""Tokens of a tile, at least: with fewer, reading the output layer's weights takes longer than the products."""
IGNORED = -100
# What transformers' configs call what is done to logits after the output layer.
_AFTER = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Tiles:
    """Asks a model for its loss in tiles, and remembers if it cannot tell."""

    def __init__(self, tile_bytes: int | None = None) -> None:
        """Begin.

        Args:
            tile_bytes: of a tile's logits in fp32; smaller ones are left whole. None: as suits the device.
        """
        self._tile_bytes, self._is_told_whole = tile_bytes, False

    def loss(
        self, model: Any, inputs: dict[str, Any], labels: Tensor, traced_for: str = "cuda"
    ) -> Tensor | None:
        """Return the sum of the loss over all labels; None where the logits have to be, or may be, whole.

        Args:
            model: a transformers causal language model.
            inputs: of its forward; `input_ids` (rows, length).
            labels: int64 (rows, length) or one longer, as of `targets`.
            traced_for: the device that a model on the meta device stands for.
        """
        head = model.get_output_embeddings()
        if self._is_told_whole or not _can(model, head):
            return None
        device = labels.device.type if labels.device.type != "meta" else traced_for
        tile_bytes = self._tile_bytes or TILE_BYTES.get(device, TILE_BYTES["cuda"])
        size = max(1 if self._tile_bytes else FEWEST, tile_bytes // (4 * head.out_features))
        is_always = device == "cpu" and self._tile_bytes is None
        if inputs["input_ids"].numel() <= size and not is_always:
            return None
        with _summing(head, targets(labels, inputs["input_ids"].shape[1]), size) as told:
            logits: Tensor = model(**inputs).logits
        if told and logits.untyped_storage()._cdata == told[0]:
            return logits.reshape(())
        # Something comes after the output layer: its logits are not the model's.
        self._is_told_whole = True
        return None


def targets(labels: Tensor, length: int) -> Tensor:
    """Return for each of `length` positions the label that follows it; after the last one none does.

    Args:
        labels: int64 (rows, length), or one longer: of a piece of a sequence, with the first of the next piece.
        length: of the logits.
    """
    following = labels[:, 1:]
    return F.pad(following, (0, length - following.shape[1]), value=IGNORED)


def _can(model: Any, head: Any) -> bool:
    """Whether logits are the plain product of an output layer, in a dtype whose gradients need no scaling."""
    config = model.config.get_text_config()
    is_plain = all(getattr(config, name, None) in (None, 1) for name in _AFTER)
    device = head.weight.device.type if type(head) is nn.Linear else "cpu"
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # fp16 wants the loss scaled before its gradients are taken; autocast, each operation in a dtype of its own.
    return is_plain and type(head) is nn.Linear and head.weight.dtype != torch.float16 and not is_cast


@contextmanager
def _summing(head: nn.Linear, labels: Tensor, size: int) -> Iterator[list[int]]:
    """Let the output layer return the loss (1, 1, 1) for the logits; yield the storage that it lies in."""
    told: list[int] = []

    def forward(hidden: Tensor) -> Tensor:
        flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if flat.device.type == "cpu":
            # Of what bears no loss, such as a prompt, no logits are made. A GPU would have to be waited for to count.
            bears = (wanted != IGNORED).nonzero().squeeze(-1)
            flat, wanted = flat[bears], wanted[bears]
        total = SumOfLosses.apply(flat, head.weight, head.bias, wanted, size)
        told.append(total.untyped_storage()._cdata)
        return total.reshape(1, 1, 1)

    # The module itself is called, so that ZeRO-3's hooks make its weights whole.
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield told
    finally:
        del head.forward


class SumOfLosses(torch.autograd.Function):
    """The cross entropy of an output layer's logits, summed, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, size: int
    ) -> Tensor:
        """Return the sum, fp32, and keep its gradients.

        Args:
            ctx: of autograd.
            hidden: (tokens, size).
            weight, bias: (vocabulary, size) and (vocabulary,).
            labels: int64 (tokens,); -100 bears no loss.
            size: tokens of a tile.
        """
        wanted = ctx.needs_input_grad[:3]
        given = (hidden, weight, bias)
        # Tiles add up in the dtype of the weights, each rounded once.
        slopes = [torch.zeros_like(x) if is_on else None for x, is_on in zip(given, wanted, strict=True)]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, slope = _tile(hidden[part], weight, bias, labels[part])
            total += loss
            _add(slopes, hidden, weight, slope, part)
        ctx.slopes = slopes
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Return the gradients kept, times what the loss is multiplied with."""
        slopes, ctx.slopes = ctx.slopes, None
        return *(None if slope is None else slope.mul_(gradient) for slope in slopes), None, None


def _tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tile's loss, and the gradient of its logits in the dtype of `hidden`."""
    logits = F.linear(hidden, weight, bias).float()
    bears, known = labels != IGNORED, labels.clamp(min=0).unsqueeze(-1)
    # In place, without the copy that `logsumexp` makes: softmax, less one at the label; nothing without a label.
    most, at_label = logits.amax(-1, keepdim=True), logits.gather(-1, known)
    slope = logits.sub_(most).exp_()
    total = slope.sum(-1, keepdim=True)
    loss = torch.where(bears, (most + total.log() - at_label).squeeze(-1), 0.0).sum()
    slope.div_(total).scatter_add_(-1, known, slope.new_full((1, 1), -1.0).expand_as(known))
    return loss, slope.mul_(bears.unsqueeze(-1)).to(hidden.dtype)


def _add(slopes: list[Tensor | None], hidden: Tensor, weight: Tensor, slope: Tensor, part: slice) -> None:
    of_hidden, of_weight, of_bias = slopes
    if of_hidden is not None:
        torch.mm(slope, weight, out=of_hidden[part])
    if of_weight is not None:
        torch.addmm(of_weight, slope.t(), hidden[part], out=of_weight)
    if of_bias is not None:
        of_bias += slope.sum(0)
