"""What a step's gradients come to before the update, and letting them go without one.

DeepSpeed finds some of the numbers gone wrong itself, in its optimizers' steps, differently in each, and too late to
be asked. Where each optimizer has its gradients between the last backward and the step is known here, by class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

Wrapped = FP16_Optimizer | FP16_UnfusedOptimizer


class Gradients:
    """The gradients of one engine between the last backward of a step and its update."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.zero = engine, engine.optimizer

    def square_sum(self) -> torch.Tensor:
        """Return this rank's share of the squared norm; the sum over all ranks is that of the whole gradient."""
        zero, share = self.zero, dist.get_world_size()
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            is_away = zero.offload_optimizer
            found = _squares(
                zero.norm_for_param_grads.values() if is_away else _chained(zero.averaged_gradients)
            )
            share = 1
        elif isinstance(zero, DeepSpeedZeroOptimizer):
            if zero.cpu_offload:
                zero._wait_for_offload_copies()
            found = _squares(
                zero.norm_for_param_grads.values() if zero.cpu_offload else _chained(zero.averaged_gradients)
            )
            share = 1
        elif isinstance(zero, BF16_Optimizer):
            found = _squares(zero.get_grads_for_norm()[0])
        else:
            found = _squares(each.grad for each in self.engine.module.parameters())
        return found / (share * self._scale() ** 2)

    def discard(self) -> None:
        """Let the gradients go: weights, the optimizer's state and the scheduler stay as they are."""
        zero = self.zero
        # In each case what the optimizer itself does where it finds an overflow.
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(zero.loss_scale)
        elif isinstance(zero, DeepSpeedZeroOptimizer):
            self._discard_of_stage_1_and_2()
        elif isinstance(zero, BF16_Optimizer):
            zero.clear_hp_grads()
            zero.clear_lp_grads()
        else:
            self.engine.zero_grad()
        self.engine.skipped_steps += 1
        self.engine.global_steps += 1
        self.engine.global_samples += self.engine.train_batch_size()
        self.engine.micro_steps += 1

    def heals(self) -> bool:
        """Return whether a dynamic loss scale can still fall: DeepSpeed skips an overflow then, and lowers it."""
        if not self.engine.fp16_enabled():
            return False
        if isinstance(self.zero, Wrapped):
            config = self.zero.loss_scale_config
            return bool(config.dynamic_loss_scale and config.cur_scale > config.min_loss_scale)
        scaler = self.zero.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

    def _discard_of_stage_1_and_2(self) -> None:
        zero = self.zero
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero._wait_for_offload_copies()
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None

    def _scale(self) -> float:
        return float(self.engine._get_optimizer_loss_scale()) if self.engine.fp16_enabled() else 1.0


def _chained(groups: dict[int, Any]) -> Iterable[torch.Tensor | None]:
    return (each for group in groups.values() if group is not None for each in group)


def _squares(tensors: Iterable[Any]) -> torch.Tensor:
    """Return the sum of squares of gradients, or of their norms, on the device where they are."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for each in tensors:
        if each is not None:
            given = torch.as_tensor(each).detach()
            by_type.setdefault(given.dtype, []).append(given)
    total = torch.zeros((), dtype=torch.float64)
    for dtype, alike in by_type.items():
        of_half = torch.float32 if dtype.itemsize < 4 else None
        norms = torch._foreach_norm(alike, 2, dtype=of_half)
        # Squared in 64 bits: a norm of 1e20 is large, and still a number.
        found = torch.stack(list(norms)).double().square().sum()
        total = total.to(found.device, non_blocking=True) + found
    return total
