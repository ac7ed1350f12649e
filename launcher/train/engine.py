"""One optimizer step with global normalisation over sharded state: the door to DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist

from launcher.plan.plan import StagePlan
from launcher.train import model as models
from launcher.train import packed

if TYPE_CHECKING:
    from launcher.data.feed import MicroBatch, StepBatch
    from launcher.tasks.base import Task


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step gave: the mean loss over the global batch, the gradient's norm."""

    loss: float
    gradient_norm: float
    learning_rate: float
    save_wanted: bool


class Engine:
    """A DeepSpeed engine that trains on whole global batches."""

    def __init__(self, model: Any, task: Task, plan: StagePlan, *, seed: int, device: torch.device) -> None:
        self.task, self.plan, self.seed, self.device = task, plan, seed, device
        self.num_workers = dist.get_world_size()
        self.engine, self.optimizer, _, scheduler = deepspeed.initialize(
            model=model, model_parameters=models.parameter_groups(model), config=plan.ds
        )
        self.has_own_scheduler = scheduler is not None
        if plan.kind == "packed":
            packed.check(self.module)

    @property
    def module(self) -> Any:
        """The model inside."""
        return self.engine.module

    def step(self, batch: StepBatch, lr: float, *, save_wanted: bool = False) -> StepResult:
        """Train on this rank's part of a global batch, and update.

        The loss is the sum over the micro-batch divided by the number of loss-bearing labels of the
        whole global batch. DeepSpeed averages gradients over the ranks, so their number multiplies.

        Args:
            batch: this rank's micro-batches.
            lr: the learning rate of this step, unless the ds config brings a scheduler.
            save_wanted: whether this rank wants a checkpoint now; one rank's wish is told to all.
        """
        self.engine.train()
        if not self.has_own_scheduler:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        used_lr = float(self.optimizer.param_groups[0]["lr"])
        told = torch.zeros(2, dtype=torch.float64, device=self._told_device())
        last = len(batch.micro_batches) - 1
        own_norm = None
        for i, micro_batch in enumerate(batch.micro_batches):
            self._seed_dropout(batch.step, micro_batch.chunk)
            tensors = self._tensors(micro_batch)
            loss_sum = self.task.loss(self._logits(tensors), tensors)
            self.engine.set_gradient_accumulation_boundary(i == last)
            scale = self.num_workers / max(1, batch.num_targets)
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            if i == last:
                own_norm = self._own_norm()
            self.engine.step()
            told[0] += loss_sum.detach()
        told[1] = float(save_wanted)
        dist.all_reduce(told)
        loss, wanted = told.tolist()
        return StepResult(loss / max(1, batch.num_targets), self._norm(own_norm), used_lr, wanted > 0)

    def pinned(self, batch: StepBatch) -> StepBatch:
        """Return the batch in page-locked memory, from which it is copied to a GPU beside its work."""
        if self.device.type != "cuda":
            return batch
        micro_batches = [
            replace(each, features={k: torch.from_numpy(v).pin_memory() for k, v in each.features.items()})
            for each in batch.micro_batches
        ]
        return replace(batch, micro_batches=micro_batches)

    def prove_packing(self, batch: MicroBatch) -> None:
        """Show on a packed micro-batch that no sample sees another; every rank must call it.

        Raises:
            ModelError: one does.
        """
        packed.self_test(self.module, self._logits, self._tensors(batch))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Return exact metrics: sums over each rank's samples, added up once over all ranks."""
        self.engine.eval()
        total: torch.Tensor | None = None
        for batch in batches:
            tensors = self._tensors(batch)
            logits = self._logits(tensors)
            sums = self.task.measure(logits, tensors, self.task.loss(logits, tensors)).double()
            total = sums if total is None else total + sums
        assert total is not None, "an eval split has at least one batch on every rank"
        total = total.to(self._told_device())
        dist.all_reduce(total)
        return self.task.metrics(total.cpu())

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits of one batch, in evaluation mode; every rank must call it."""
        self.engine.eval()
        logits = self._logits(self._tensors(batch)).float().cpu()
        # No backward follows, for which ZeRO-3 has begun to fetch parameters: an export would trip over them.
        self.engine.empty_partition_cache()
        return logits

    def close(self) -> None:
        """Give the memory back, so that the next stage can build its engine in this process."""
        self.engine.destroy()
        del self.engine, self.optimizer

    def _logits(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs: dict[str, Any] = {name: value for name, value in tensors.items() if name != "labels"}
        if "position_ids" in inputs:
            inputs = packed.inputs(self.module, inputs)
        return self.engine(**inputs).logits

    def _tensors(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {
            name: torch.as_tensor(values).to(self.device, non_blocking=True)
            for name, values in batch.features.items()
        }

    def _seed_dropout(self, step: int, chunk: int) -> None:
        # Keyed by step and chunk, so a resume drops the same units, and no random state has to be kept.
        torch.manual_seed((self.seed * 1_000_003 + step) * 65_537 + chunk)

    def _told_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")

    def _own_norm(self) -> torch.Tensor | None:
        # Without ZeRO in fp32 DeepSpeed keeps no norm; gradients are whole and averaged at this point.
        is_plain = not (self.engine.fp16_enabled() or self.engine.bfloat16_enabled())
        if self.engine.zero_optimization_stage() or not is_plain:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _norm(self, own: torch.Tensor | None) -> float:
        norm = self.engine.get_global_grad_norm()
        norm = own if norm is None else norm
        return float(norm) if norm is not None else float("nan")
