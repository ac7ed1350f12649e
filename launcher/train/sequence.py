"""Sequence parallelism (Ulysses): a team of workers shares each sample, and each has a piece of its tokens.

All that a model does token by token needs nothing of the others. For attention the workers of a team exchange:
before it each gets all tokens of a part of the heads, after it all heads of its own tokens (Jacobs et al., 2023).

DeepSpeed 0.19.8 has this for transformers (`UlyssesSPAttentionHF`), and the way of getting between a model and its
attention is taken from there: the name of the implementation stays, what stands under it is replaced. The
exchange itself is made here, since DeepSpeed's drops every mask (with sdpa the samples of a pack would see each
other, windows of attention would be gone), wants the same number of rows always, and gathers position ids in every
layer. Nor does the engine hear of teams: the loss is a sum over tokens, wherever they are, so gradients
are averaged over all workers as ever, and the same factor holds in every ZeRO stage.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.errors import ModelError
from launcher.plan import sequence
from launcher.train import packed

IGNORED = -100
_REMEDY = f"leave {sequence.KEY} out of the ds config"
# Their frequencies depend on the longest position, which each worker would find in its own piece.
_ROPES_OF_LENGTH = {"dynamic", "longrope"}


class Team:
    """The workers that share this rank's samples; to be closed before another is made."""

    def __init__(self, models: Sequence[Any], size: int) -> None:
        """Begin; every rank must call it.

        Args:
            models: whose attention is to be shared, all with the same implementation.
            size: of a team: neighbours by rank.

        Raises:
            ModelError: a model cannot be shared.
        """
        for model in models:
            check(model, size)
        self.size, self.place, self.num_calls = size, dist.get_rank() % size, 0
        self.attention: str = packed.attention_of(models[0])
        self._group = _group(size)
        self._whole_attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.attention]
        # For as long as the engine lives: activations may be computed again in a backward.
        AttentionInterface.register(self.attention, self._attend)

    def close(self) -> None:
        """Put back what was replaced."""
        AttentionInterface.register(self.attention, self._whole_attention)
        dist.destroy_process_group(self._group)

    def inputs(self, model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return this rank's piece of a micro-batch, and what its attention needs of the whole.

        Args:
            model: the transformers model.
            tensors: the same on all ranks of the team: input_ids and labels (rows, length), padded on the right;
                of packs position_ids.

        Returns:
            As `packed.inputs`, of `share` tokens; and labels of one more: the first of the next piece.
        """
        ids, labels = tensors["input_ids"], tensors["labels"]
        length = ids.shape[1]
        share = -(-length // self.size)
        rest, begin = share * self.size - length, self.place * share
        columns = torch.arange(length + rest, device=ids.device)
        # Padding comes after all tokens, so what it says does not matter to them; in packs it is one more segment.
        positions = columns.expand(len(ids), -1)
        if "position_ids" in tensors:
            positions = torch.cat([tensors["position_ids"], columns[:rest].expand(len(ids), -1)], dim=1)
        whole = {"input_ids": F.pad(ids, (0, rest)), "position_ids": positions}
        given = packed.inputs(model, whole)
        mine = slice(begin, begin + share)
        following = F.pad(labels, (0, rest + 1), value=IGNORED)[:, begin : begin + share + 1]
        pieces = {name: each[:, mine].contiguous() for name, each in whole.items()}
        return given | pieces | {"labels": following}

    def whole(self, logits: Tensor, length: int) -> Tensor:
        """Return the team's logits (rows, length, vocabulary) from each one's piece; no gradient."""
        pieces = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(pieces, logits.contiguous(), group=self._group)
        return torch.cat(pieces, dim=1)[:, :length]

    def prove(self, model: Any) -> None:
        """Show after a forward of a model that all its attention went through here.

        Raises:
            ModelError: some did not, so pieces did not see each other.
        """
        num_layers = model.config.get_text_config().num_hidden_layers
        if self.num_calls < num_layers:
            raise ModelError(
                f"{type(model).__name__} does its attention by itself in {num_layers - self.num_calls} of"
                f" {num_layers} layers, so samples cannot be divided: {_REMEDY}"
            )

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Attention over whole samples, for a part of the heads.

        Args:
            module: the layer's.
            query, key, value: (rows, heads, share, size).
            mask: of whole samples.
            args, kwargs: passed on, but for the positions, which are of a piece.

        Returns:
            (rows, share, heads, size), and no weights.
        """
        self.num_calls += 1
        kwargs.pop("position_ids", None)
        if key.shape[1] % self.size:
            # Fewer heads of keys than workers: some get the same one.
            key, value = (x.repeat_interleave(self.size // x.shape[1], dim=1) for x in (key, value))
            module.num_key_value_groups = query.shape[1] // key.shape[1]
        query, key, value = (self._to_heads(each) for each in (query, key, value))
        attended, _ = self._whole_attention(module, query, key, value, mask, *args, **kwargs)
        return self._to_tokens(attended), None

    def _to_heads(self, given: Tensor) -> Tensor:
        """(rows, heads, share, size) of a piece to (rows, heads / team, length, size)."""
        rows, heads, share, size = given.shape
        sent = given.reshape(rows, self.size, heads // self.size, share, size).permute(1, 0, 2, 3, 4)
        pieces = _Exchange.apply(sent, self._group).permute(1, 2, 0, 3, 4)
        return pieces.reshape(rows, heads // self.size, self.size * share, size)

    def _to_tokens(self, attended: Tensor) -> Tensor:
        """(rows, length, heads / team, size) to (rows, share, heads, size)."""
        rows, length, heads, size = attended.shape
        sent = attended.reshape(rows, self.size, length // self.size, heads, size).permute(1, 0, 2, 3, 4)
        parts = _Exchange.apply(sent, self._group).permute(1, 2, 0, 3, 4)
        return parts.reshape(rows, length // self.size, self.size * heads, size)


class _Exchange(torch.autograd.Function):
    """Each rank sends its i-th part to rank i; so does the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        """Return what was received."""
        ctx.group = group
        return _exchanged(sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Return the gradient of what was sent."""
        return _exchanged(gradient, ctx.group), None


def _exchanged(sent: Tensor, group: Any) -> Tensor:
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def check(model: Any, size: int) -> None:
    """Refuse a model whose attention cannot be divided among `size` workers.

    Raises:
        ModelError: with what to change.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    fault = sequence.fault_of_heads(size, heads, kv_heads)
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (ropes, *ropes.values()) if isinstance(each, dict)}
    if not fault and kinds & _ROPES_OF_LENGTH:
        fault = f"its positions are scaled by the length of a sample ({min(kinds & _ROPES_OF_LENGTH)})"
    if not fault and "position_ids" not in inspect.signature(type(model).forward).parameters:
        fault = "it takes no position_ids"
    if not fault and packed.carries_state(model):
        fault = "it has layers that carry a state along the sample, or biases of attention by distance"
    if not fault and packed.attention_of(model) not in ALL_ATTENTION_FUNCTIONS:
        fault = f"its attention ({packed.attention_of(model)}) is in its own code"
    if fault:
        raise ModelError(f"{name}: samples cannot be divided among {size} workers, since {fault}: {_REMEDY}")


def _group(size: int) -> Any:
    """Make all teams' process groups, and return this rank's; every rank must call it."""
    rank = dist.get_rank()
    teams = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    return [dist.new_group(ranks) for ranks in teams][rank // size]
