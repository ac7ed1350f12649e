"""What a rank holds of an engine's training state, parameter by parameter, whatever shards it.

DeepSpeed lays the parameters of a group side by side, pads them, cuts them among the ranks, and keeps for its part
a flat fp32 master with the optimizer's state beside it. Which elements of which parameter lie where is read off its
optimizers here, so that state can be kept without a word on the number of ranks or the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from launcher.errors import DsConfigError

WEIGHTS = "weights"
"""The key of the master weights, beside the optimizer's own keys."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start` to `start + size` of a flattened parameter, which lie at `offset` of a flat tensor."""

    name: str
    start: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat master of this rank.

    Attributes:
        number: among the masters.
        master: the tensor that the optimizer updates; its state is keyed by it.
        held: all fragments that lie in it.
        window: the part (begin, end) that this rank writes; ranks that hold the same share the work.
    """

    number: int
    master: torch.Tensor
    held: tuple[Fragment, ...]
    window: tuple[int, int]

    def written(self) -> Iterator[Fragment]:
        """Return what of the fragments lies in the window."""
        begin, end = self.window
        for each in self.held:
            first, last = max(begin, each.offset), min(end, each.offset + each.size)
            if first < last:
                yield Fragment(each.name, each.start + first - each.offset, last - first, first)


class Shards:
    """The state of one engine as flat tensors with names."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.zero = engine, engine.optimizer
        inner = getattr(self.zero, "optimizer", None)
        self.optimizer: torch.optim.Optimizer = self.zero if inner is None else inner
        self.names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.flats = tuple(self._flats())

    def num_bytes(self) -> int:
        """Return the bytes of all trained parameters' state, over all ranks."""
        trained = (each for each in self.engine.module.parameters() if each.requires_grad)
        elements = sum(getattr(each, "ds_numel", each.numel()) for each in trained)
        master = self.flats[0].master
        state = self.optimizer.state.get(master, {})
        kept = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"]
        return elements * sum(each.element_size() for each in (master, *kept))

    @contextmanager
    def present(self, flat: Flat, *, written: bool = False) -> Iterator[None]:
        """Have a flat's tensors in memory for a moment, where DeepSpeed keeps them on a disk.

        Args:
            flat: whose.
            written: whether they are changed; they then go back to the disk, and to the model's weights.
        """
        zero, i = self.zero, flat.number
        is_away = isinstance(zero, DeepSpeedZeroOptimizer_Stage3) and zero._swappable_optimizer_subgroup(i)
        if is_away:
            zero._optimizer_states_and_gradient_swap_in(i)
        yield
        if written and isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if is_away and written:
            zero._optimizer_states_and_gradient_swap_out(i)
        elif is_away:
            zero._release_swap_buffers(i)

    def tensors(self, flat: Flat) -> dict[str, torch.Tensor]:
        """Return the flat's tensors by key, one-dimensional and as long as its master; it has to be present.

        Raises:
            DsConfigError: the optimizer keeps something else.
        """
        master = flat.master
        found = {WEIGHTS: master.detach().view(-1)}
        for key, value in self.optimizer.state.get(master, {}).items():
            if not isinstance(value, torch.Tensor) or key == "step":
                continue
            if value.numel() != master.numel():
                raise DsConfigError(
                    f"the ds config's optimizer, {type(self.optimizer).__name__}, keeps {key} in another size than"
                    " its parameters, which no checkpoint here can hold: choose another, such as AdamW"
                )
            found[key] = value.detach().view(-1)
        return found

    def ensure(self, flat: Flat, keys: list[str]) -> dict[str, torch.Tensor]:
        """Return tensors like `tensors`, made where the optimizer has none yet."""
        state = self.optimizer.state[flat.master]
        for key in keys:
            if key != WEIGHTS and key not in state:
                state[key] = torch.zeros_like(flat.master, memory_format=torch.preserve_format)
        return self.tensors(flat)

    def scalars(self) -> dict[str, float]:
        """Return what the optimizer keeps besides: the same for all parameters, as the number of steps."""
        found: dict[str, float] = {}
        for flat in self.flats[:1]:
            for key, value in self.optimizer.state.get(flat.master, {}).items():
                if isinstance(value, int | float) or key == "step":
                    found[key] = float(value)
        steps = [group["step"] for group in self.optimizer.param_groups if "step" in group]
        return found | ({"step": float(steps[0])} if steps else {})

    def set_scalars(self, scalars: dict[str, float]) -> None:
        """Give the optimizer back what `scalars` returned, in the form that its class wants."""
        # torch's optimizers count in a tensor beside each parameter, DeepSpeed's in a number there or in the group.
        in_tensors = type(self.optimizer).__module__.startswith("torch.optim")
        in_groups = type(self.optimizer).__name__ in ("FusedAdam", "FusedLamb", "FusedLion")
        for flat in self.flats:
            state = self.optimizer.state[flat.master]
            for key, value in scalars.items():
                if not (in_groups and key == "step"):
                    state[key] = torch.tensor(value, dtype=torch.float32) if in_tensors else int(value)
        for group in self.optimizer.param_groups:
            if in_groups and "step" in scalars:
                group["step"] = int(scalars["step"])

    def begin_restore(self) -> None:
        """Get ready for changed masters."""
        if isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
            self.zero.checkpoint_event_prologue()

    def end_restore(self) -> None:
        """Take changed masters over into the weights that the model computes with; every rank calls it."""
        zero = self.zero
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            zero.checkpoint_event_epilogue()
        elif isinstance(zero, DeepSpeedZeroOptimizer | BF16_Optimizer):
            zero.update_lp_params()
        elif isinstance(zero, FP16_UnfusedOptimizer):
            for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)
        elif isinstance(zero, FP16_Optimizer):
            for weights, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
                for weight, offset in zip(weights, _offsets(weights), strict=True):
                    weight.data.copy_(flat.data[offset : offset + weight.numel()].view_as(weight))

    def _flats(self) -> Iterator[Flat]:
        zero = self.zero
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            for i, (group, master) in enumerate(
                zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
            ):
                # Of a master on a disk only the number is here.
                yield Flat(
                    i, master, tuple(self._parts(group)), (0, zero.fp16_partitioned_groups_flat_numel[i])
                )
        elif isinstance(zero, DeepSpeedZeroOptimizer):
            yield from self._mapped(zero.bit16_groups, zero.single_partition_of_fp32_groups)
        elif isinstance(zero, BF16_Optimizer):
            yield from self._mapped(zero.bf16_groups, zero.fp32_groups_flat_partition)
        elif isinstance(zero, FP16_UnfusedOptimizer):
            pairs = zip(_chained(zero.fp16_groups), _chained(zero.fp32_groups), strict=True)
            yield from self._whole([([weight], master) for weight, master in pairs])
        elif isinstance(zero, FP16_Optimizer):
            yield from self._whole(list(zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True)))
        else:
            every = _chained(group["params"] for group in zero.param_groups)
            yield from self._whole([([each], each) for each in every])

    def _parts(self, group: list[Any]) -> Iterator[Fragment]:
        """ZeRO-3: each parameter is cut into equal parts, of which the last ones are padded."""
        for parameter in group:
            _, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.zero._get_param_partition_rank(parameter) * numel
            size = min(numel, parameter.ds_numel - start)
            if size > 0:
                yield Fragment(self.names[id(parameter)], start, size, offset)

    def _mapped(self, groups: list[Any], masters: list[torch.Tensor]) -> Iterator[Flat]:
        """ZeRO-1 and 2: a whole group is cut; DeepSpeed notes on each parameter what of it this rank has."""
        for i, (group, master) in enumerate(zip(groups, masters, strict=True)):
            held = []
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    held.append(Fragment(self.names[id(parameter)], here.start, here.numel, there.start))
            yield Flat(i, master, tuple(held), (0, master.numel()))

    def _whole(self, groups: list[tuple[list[Any], torch.Tensor]]) -> Iterator[Flat]:
        """Without ZeRO every rank has everything, and writes an equal part of it."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for i, (weights, master) in enumerate(groups):
            part = ceil(master.numel() / world)
            window = (min(rank * part, master.numel()), min((rank + 1) * part, master.numel()))
            offsets = _offsets(weights)
            held = [
                Fragment(self.names[id(w)], 0, w.numel(), o) for w, o in zip(weights, offsets, strict=True)
            ]
            yield Flat(i, master, tuple(held), window)


def _offsets(weights: list[Any]) -> list[int]:
    """Where each lies when they are laid side by side."""
    found, offset = [], 0
    for weight in weights:
        found.append(offset)
        offset += weight.numel()
    return found


def _chained(groups: Any) -> list[Any]:
    return [each for group in groups for each in group]
