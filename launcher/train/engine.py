"""One optimizer step with global normalisation over sharded state: the door to DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.utils import groups as ds_groups
from deepspeed.utils import set_z3_leaf_module

from launcher import exact
from launcher.errors import DsConfigError
from launcher.plan.plan import StagePlan
from launcher.train import compiled, packed, recompute, sequence, varlen
from launcher.train import light as _light  # noqa: F401  before DeepSpeed does what it leaves out
from launcher.train.gradients import Gradients
from launcher.train.parts import Parts
from launcher.train.step import NO_WISHES, Fault, StepResult, Wishes, no_fault
from launcher.train.trainable import Group

if TYPE_CHECKING:
    from launcher.data.feed import MicroBatch, StepBatch

    Take = Callable[[MicroBatch, dict[str, Any], Any, torch.Tensor | None], None]


class Engine:
    """A DeepSpeed engine that trains on whole global batches, of one stage or of several jointly."""

    def __init__(
        self,
        parts: Parts,
        groups: Sequence[Group],
        plan: StagePlan,
        *,
        weights: Sequence[float],
        seed: int,
        device: torch.device,
    ) -> None:
        """Build it.

        Args:
            parts: what is trained.
            groups: the parameters for the optimizer.
            plan: of the stage whose steps are made.
            weights: of each part's loss in the sum.
            seed: of dropout.
            device: of this rank.
        """
        self.parts, self.groups, self.weights = parts, list(groups), list(weights)
        self.seed, self.device = seed, device
        self.num_workers = dist.get_world_size()
        for module in recompute.tiled(parts):
            # ZeRO-3 is to make its weights whole once, not once for each layer in it and each tile.
            set_z3_leaf_module(module, True)
        self.engine, self.optimizer, _, scheduler = deepspeed.initialize(
            model=parts, model_parameters=[_for_optimizer(group) for group in groups], config=plan.ds
        )
        self.gradients = Gradients(self.engine)
        self.has_own_scheduler = scheduler is not None
        if self.has_own_scheduler and any(group.scale != 1 or group.opens_after for group in groups):
            raise DsConfigError(
                "the ds config brings a scheduler of its own, which knows nothing of layer_decay, unfreeze_every or"
                " head.learning_rate: remove its scheduler section"
            )
        if plan.kind == "packed":
            packed.check(self.model())
            if plan.team == 1:
                varlen.turn_on(self.model(), device)
        self.team = sequence.Team(parts.models, plan.team) if plan.team > 1 else None

    @property
    def is_offloaded(self) -> bool:
        """Whether the optimizer's state is in the host's memory or on its disks already."""
        return bool(self.engine.zero_cpu_offload() or self.engine.zero_nvme_offload_optimizer())

    def model(self, part: int = -1) -> Any:
        """Return the transformers model of a part; by default of the main one."""
        return self.parts.models[part]

    def step(
        self,
        batches: tuple[StepBatch, ...],
        lr: float,
        wishes: Wishes = NO_WISHES,
        *,
        fault: Fault = no_fault,
    ) -> StepResult:
        """Train on this rank's part of a global batch, and update, unless its numbers have gone wrong.

        The loss of each part is the sum over its micro-batches divided by the number of loss-bearing labels
        of its whole global batch, times its weight; parts are added. DeepSpeed averages gradients over the
        ranks, so their number multiplies.

        Args:
            batches: for each part this rank's micro-batches; as many in every part on every rank.
            lr: the learning rate of this step, unless the ds config brings a scheduler.
            wishes: of this rank; they are told to all.
            fault: judges loss and norm before the update; what it says is the same on all ranks.
        """
        self.engine.train()
        step = batches[0].step
        if not self.has_own_scheduler:
            for asked, group in zip(self.groups, self.optimizer.param_groups, strict=True):
                group["lr"] = lr * asked.scale if step > asked.opens_after else 0.0
        used_lr = max(float(group["lr"]) for group in self.optimizer.param_groups)
        rounds = list(zip(*(batch.micro_batches for batch in batches), strict=True))
        parts = []
        for i, round_ in enumerate(rounds):
            self._seed_dropout(step, round_[0].chunk)
            is_last = i == len(rounds) - 1
            self.engine.set_gradient_accumulation_boundary(is_last)
            parts.append(self.backward(batches, round_))
            if not is_last:
                self.engine.step()
        squares = self.gradients.square_sum().to(self._told_device()).view(1)
        sums, square, wishes = self._told(torch.stack(parts).sum(0), squares, wishes)
        losses = [total / max(1, batch.num_targets) for total, batch in zip(sums, batches, strict=True)]
        loss = sum(weight * each for weight, each in zip(self.weights, losses, strict=True))
        found = fault(loss, norm := math.sqrt(square), heals=self.gradients.heals())
        if found:
            self.gradients.discard()
        else:
            self.engine.step()
        by_micro_batch = torch.stack(parts).tolist() if found else []
        return StepResult(loss, losses, norm, used_lr, wishes, found, by_micro_batch)

    def passed_by(self, batches: tuple[StepBatch, ...], why: str, wishes: Wishes) -> StepResult:
        """Make no step of these batches, and agree on the wishes as a step does; every rank must call it."""
        nothing = torch.zeros(len(batches), dtype=torch.float64, device=self._told_device())
        *_, wishes = self._told(nothing, nothing[:1], wishes)
        return StepResult(math.nan, [math.nan] * len(batches), math.nan, 0.0, wishes, fault=why)

    def _told(
        self, sums: torch.Tensor, squares: torch.Tensor, wishes: Wishes
    ) -> tuple[list[float], float, Wishes]:
        """Add up over all ranks what a step tells, in one exchange: loss sums, the squared norm, wishes."""
        wished = torch.tensor([float(wishes.save), float(wishes.leave)], dtype=torch.float64)
        told = torch.cat([sums, squares, wished.to(sums.device, non_blocking=True)])
        dist.all_reduce(told)
        *all_sums, square, saving, leaving = told.tolist()
        return all_sums, square, Wishes(saving > 0, leaving > 0)

    def backward(self, batches: tuple[StepBatch, ...], round_: tuple[MicroBatch, ...]) -> torch.Tensor:
        """Run one micro-batch of every part forward and backward; return their loss sums."""
        sums = self._sums([self._tensors(micro_batch) for micro_batch in round_])
        loss = sum(
            total * (weight * self.num_workers / max(1, batch.num_targets))
            for total, weight, batch in zip(sums, self.weights, batches, strict=True)
        )
        self.engine.backward(loss, scale_wrt_gas=False)
        return torch.stack([total.detach().double() for total in sums]).to(self._told_device())

    def _sums(self, tensors: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Run forward; return each part's sum of losses. Logits that nothing needs are gone when this returns."""
        given = [self._given(part, each) for part, each in enumerate(tensors)]
        outputs = self.engine(given)
        if self.team is not None:
            self.team.prove(self.model())
        return [
            task.loss(output, batch)
            for task, output, batch in zip(self.parts.tasks, outputs, given, strict=True)
        ]

    def pinned(self, batch: StepBatch) -> StepBatch:
        """Return the batch in page-locked memory, from which it is copied to a GPU beside its work."""
        if self.device.type != "cuda":
            return batch
        micro_batches = [
            replace(each, features={k: torch.from_numpy(v).pin_memory() for k, v in each.features.items()})
            for each in batch.micro_batches
        ]
        return replace(batch, micro_batches=micro_batches)

    @compiled.aside_in
    def prove_packing(self, batch: MicroBatch) -> None:
        """Show on a packed micro-batch that no sample sees another; every rank must call it.

        Raises:
            ModelError: one does.
        """
        last = len(self.parts.tasks) - 1
        packed.self_test(self.model(), lambda tensors: self._logits(last, tensors), self._tensors(batch))

    def evaluate(self, part: int, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Return exact metrics of one part; every rank must call it."""
        return self.parts.tasks[part].metrics(self.sums(part, batches))

    def sums(self, part: int, batches: Iterable[MicroBatch]) -> torch.Tensor:
        """Return what metrics are made of: sums over each rank's samples, added up once over all ranks."""
        task, totals = self.parts.tasks[part], list[torch.Tensor]()

        def add(_: MicroBatch, given: dict[str, Any], outputs: Any, generated: torch.Tensor | None) -> None:
            sums = exact.rounded(task.measure(outputs, given, task.loss(outputs, given), generated))
            totals[:] = [sums + each for each in totals] or [sums]

        self.answer(part, batches, add)
        # An eval split has at least one batch on every rank.
        dist.all_reduce(total := totals[0].to(self._told_device()))
        return total.cpu()

    @compiled.aside_in
    @torch.no_grad()
    def answer(
        self, part: int, batches: Iterable[MicroBatch], take: Take, limits: dict[str, Any] | None = None
    ) -> None:
        """Answer batches in evaluation mode; every rank must call it, with as many.

        Args:
            take: is given each batch, its tensors, the part's outputs on them, and generated ids or None.
            limits: generate in any case, with these settings of transformers; None: only if evaluation does.
        """
        self.engine.eval()
        for batch in batches:
            tensors = self._tensors(batch)
            given = self._given(part, tensors)
            outputs = self._outputs(part, given)
            take(batch, given, outputs, self._generated(part, tensors, limits))

    @compiled.aside_in
    @torch.no_grad()
    def logits(self, part: int, batch: MicroBatch) -> torch.Tensor:
        """Return a part's logits of one batch, in evaluation mode; every rank must call it."""
        self.engine.eval()
        logits = self._logits(part, self._tensors(batch))
        # No backward follows, for which ZeRO-3 has begun to fetch parameters: an export would trip over them.
        self.engine.empty_partition_cache()
        return logits.float().cpu()

    def close(self) -> None:
        """Give the memory back, so that the next stage can build its engine in this process."""
        zero = self.engine.optimizer
        self.engine.destroy()
        # Autograd keeps ZeRO-3's hooks, they its optimizer, and that every shard: the chain is cut by hand.
        for parameter in self.parts.parameters():
            vars(parameter).clear()
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
        if self.team is not None:
            self.team.close()
        for owner in (zero, self.engine):
            vars(owner).clear()
        # hpZ (zero_hpz_partition_size) makes its group anew for each model, and refuses where one is known.
        if (group := ds_groups._get_zero_param_intra_parallel_group()) is not None:
            deepspeed.comm.destroy_process_group(group)
        # ZeRO-3 leaves its linear layers, which keep every input, to all models that come after.
        F.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", F.linear)
        del self.engine, self.optimizer, self.gradients

    def _given(self, part: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return a micro-batch as a part's model takes it: of a team's, this rank's piece."""
        if self.team is not None:
            return self.team.inputs(self.model(part), tensors)
        if "position_ids" not in tensors:
            return tensors
        return packed.inputs(self.model(part), tensors) | {"labels": tensors["labels"]}

    def _outputs(self, part: int, given: dict[str, Any]) -> Any:
        """Run one part alone."""
        batches: list[Any] = [None] * len(self.parts.tasks)
        batches[part] = given
        outputs = self.engine(batches)[part]
        if self.team is not None:
            self.team.prove(self.model(part))
        return outputs

    def _logits(self, part: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a part's logits of whole samples."""
        outputs = self._outputs(part, self._given(part, tensors))
        logits: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits if self.team is None else self.team.whole(logits, tensors["input_ids"].shape[1])

    def _generated(
        self, part: int, tensors: dict[str, torch.Tensor], limits: dict[str, Any] | None
    ) -> torch.Tensor | None:
        task = self.parts.tasks[part]
        if not task.generates and limits is None:
            return None
        is_partitioned = self.engine.zero_optimization_stage() == 3
        generated = task.generate(self.model(part), tensors, synced=is_partitioned, limits=limits or {})
        self.engine.empty_partition_cache()
        return generated

    def _tensors(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        found = {
            name: torch.as_tensor(values).to(self.device, non_blocking=True)
            for name, values in batch.features.items()
        }
        if "position_ids" in found and self.team is None:
            positions = torch.as_tensor(batch.features["position_ids"])
            found[packed.BOUNDS] = packed.bounds(positions, self.device)
        return found

    def _seed_dropout(self, step: int, chunk: int) -> None:
        # Keyed by step and chunk, so a resume drops the same units, and no random state has to be kept.
        if self.team is not None:
            chunk = chunk * self.team.size + self.team.place
        torch.manual_seed((self.seed * 1_000_003 + step) * 65_537 + chunk)

    def _told_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def _for_optimizer(group: Group) -> dict[str, Any]:
    return {"params": list(group.parameters), **({} if group.is_decayed else {"weight_decay": 0.0})}
