"""One micro-batch on the meta device: what its activations take, found without weights, data or a GPU.

Operations run on tensors that have shapes and no bytes; each storage that comes into being is counted until
it is freed, as the allocator would. Parameters and the gradients that stay are left out: they are the
plan's to count, since ZeRO decides where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from launcher.plan.shapes import Trace, frontier

ATTENTION = "launcher-shapes"
"""The attention implementation that a model to be traced is built with."""


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it and still alive, and the operations' work."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        """Begin.

        Args:
            known: tensors that are there already, and are not counted.
        """
        super().__init__()
        self.used, self.flops, self.gradients = 0, 0, 0
        self._at: dict[int, int] = {}
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        work = flop_registry.get(func._overloadpacket)
        if work is not None:
            self.flops += int(work(*args, **(kwargs or {}), out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def arrived(self, parameter: Tensor) -> None:
        """Take a parameter's whole gradient out of the count: it is among those that stay, or is reduced."""
        parameter.grad = None
        self.gradients += parameter.numel()
        self._mark()

    def curve(self) -> tuple[tuple[int, int], ...]:
        """Return what `Trace.curve` holds."""
        return frontier((used, elements) for elements, used in self._at.items())

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.used += size
        self._mark()

    def _freed(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.used -= size

    def _mark(self) -> None:
        self._at[self.gradients] = max(self._at.get(self.gradients, 0), self.used)


def run(
    module: nn.Module,
    batches: list[dict[str, Tensor]],
    loss_of: Callable[[Any], Tensor],
    *,
    rows: int,
    length: int,
    attention_work: list[int],
    is_partitioned: bool,
) -> Trace:
    """Trace one forward and backward.

    Args:
        module: on the meta device, in training mode; takes `batches`.
        batches: of each part, on the meta device.
        loss_of: from the module's outputs to the loss.
        rows, length: of the batches, for the record.
        attention_work: what `register_attention` returned.
        is_partitioned: whether linear layers keep the inputs of frozen weights too, as ZeRO-3's do.
    """
    given = [tensor for batch in batches for tensor in batch.values()]
    attention_work.clear()
    live = Live([*module.parameters(), *module.buffers(), *given])
    with _hooked(module, live), _linear(is_partitioned), live:
        outputs = module(batches)
        logits = sum(dict(map(_bytes, tree_leaves(outputs))).values())
        held = max(0, live.used - logits)
        loss = loss_of(outputs)
        del outputs  # As in training: what the loss does not keep of them is gone.
        of_outputs = max(0, live.used - held)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
    return Trace(
        rows=rows,
        length=length,
        held=held,
        outputs=of_outputs,
        curve=live.curve(),
        flops=live.flops + sum(attention_work),
        attention_flops=sum(attention_work),
    )


def register_attention(device: str, name: str, team: int = 1, *, is_packed: bool = False) -> list[int]:
    """Let `ATTENTION` hold what the attention of a device holds.

    Args:
        device: `cuda` or `cpu`.
        name: the implementation asked for, as the recipe has it.
        team: workers that share a sample: each has a share of the heads, for the whole length.
        is_packed: whether samples lie one after another in a row, kept apart by a mask.

    Returns:
        A list that gets the floating-point operations of each attention, as it is run.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    work: list[int] = []

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        # Torch's fused kernel on CPUs knows no dropout, and none a gradient of the bias.
        is_fused = not (mask is not None and mask.requires_grad) and not (device == "cpu" and dropout > 0)
        if is_fused:
            return _Fused.apply(query, key, value, mask, team * _work(module, query, key), work), None
        groups = query.shape[1] // key.shape[1]
        keys, values = (
            each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value)
        )
        attended = F.scaled_dot_product_attention(query, keys, values, mask, dropout, scale=scaling)
        return attended.transpose(1, 2).contiguous(), None

    def mask_of(
        batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **kwargs: Any
    ) -> Tensor | None:
        # One row has no padding to be masked, and for a team's rows padding is never told.
        is_plain = not is_packed and local_size is None and (batch_size == 1 or team > 1)
        if name == "flash_attention_2" or is_plain:
            return None
        shape = batch_size, 1, team * q_length, team * kv_length
        return torch.empty(shape, dtype=torch.bool, device="meta")

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, mask_of)
    return work


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output, one number a row and head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, own: int, work: list[int]
    ) -> Tensor:
        rows, heads, length, _ = query.shape
        result = query.new_empty(rows, length, heads, value.shape[-1])
        sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        ctx.own, ctx.work = own, work
        work.append(own)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        ctx.work.append(5 * ctx.own // 2)  # Five products of matrices for the two of the forward.
        return *(torch.empty_like(each) for each in (query, key, value)), None, None, None


class _Linear(torch.autograd.Function):
    """A linear layer as ZeRO-3 has it (deepspeed/runtime/zero/linear.py): its input is kept, frozen or not."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(given, weight)
        result = given.matmul(weight.t())
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        given, weight = ctx.saved_tensors
        of_given, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient.matmul(weight) if of_given else None,
            rows.t().matmul(given.reshape(-1, given.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


@contextmanager
def _linear(is_partitioned: bool) -> Iterator[None]:
    usual = F.linear
    if is_partitioned:
        F.linear = lambda given, weight, bias=None: _Linear.apply(given, weight, bias)
    try:
        yield
    finally:
        F.linear = usual


def _work(module: Any, query: Tensor, key: Tensor) -> int:
    """The operations of an attention's two products; half of them where nothing is seen ahead."""
    rows, heads, length, size = query.shape
    return (
        4 * rows * heads * length * key.shape[2] * size // (2 if getattr(module, "is_causal", False) else 1)
    )


def _bytes(leaf: Any) -> tuple[int, int]:
    if not isinstance(leaf, Tensor):
        return 0, 0
    storage = leaf.untyped_storage()
    return storage._cdata, storage.nbytes()


@contextmanager
def _hooked(module: nn.Module, live: Live) -> Iterator[None]:
    hooks = [
        parameter.register_post_accumulate_grad_hook(live.arrived)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
