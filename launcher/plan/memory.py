"""What a stage needs on each worker and on each host, by item and phase: bytes, and why.

The formulas are read off DeepSpeed 0.19.8; each item names where. They hold for one worker, which is one GPU,
or one process where there are none.
"""

from collections.abc import Iterator
from math import ceil
from typing import Literal

from launcher.plan import live
from launcher.plan.ds_memory import Sharding
from launcher.plan.need import ALWAYS, TRAINING, Item, Need, Phase
from launcher.plan.shapes import Parameter, Shapes, Trace

STAGE3 = "deepspeed/runtime/zero/stage3.py"
STAGE12 = "deepspeed/runtime/zero/stage_1_and_2.py"
CHECKPOINT_COPY = "copy for the checkpoint"
GPU_FRAMEWORK = 1_500_000_000
"""CUDA context, NCCL's buffers, workspaces of cuBLAS: not measured here."""


def of_stage(
    shapes: Shapes, trace: Trace, sharding: Sharding, *, num_workers: int, accumulation: int, device: str
) -> Need:
    """Return what a stage needs.

    Args:
        shapes: of its model.
        trace: of the micro-batch, as it is run.
        sharding: the ds config's settings.
        num_workers: over all nodes.
        accumulation: micro-batches of a step on each worker.
        device: `cuda` or `cpu`.
    """
    make = {0: _stage_0, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}[sharding.stage]
    sizes = _Sizes(shapes, sharding, num_workers)
    items = [*make(sizes, sharding, accumulation)]
    items += _computing(sizes, sharding, trace, accumulation, _coming(items, accumulation))
    in_update = sum(i.bytes for i in items if i.phases[-1] == "update")
    items += _updating(sizes, sharding, device, in_update)
    items += _around(sizes, sharding, device)
    return Need(tuple(item for item in items if item.bytes > 0))


class _Sizes:
    """Elements of a stage's parameters, whole and by worker."""

    def __init__(self, shapes: Shapes, sharding: Sharding, num_workers: int) -> None:
        self.shapes, self.num_workers = shapes, num_workers
        self.trained = [each for each in shapes.parameters if each.group is not None]
        self.frozen = [each for each in shapes.parameters if each.group is None]
        self.num_trained, self.num_frozen = shapes.num_trained, shapes.num_frozen
        self.largest = max(each.numel for each in shapes.parameters)
        groups: dict[int, list[Parameter]] = {}
        for each in self.trained:
            groups.setdefault(each.group or 0, []).append(each)
        self.groups = list(groups.values())
        if sharding.stage == 3:
            # Each parameter is cut into equal parts, and padded to them.
            self.shares = [sum(self.part(p) for p in group) for group in self.groups]
        else:
            # A whole group is cut; parts begin at multiples of two elements.
            self.shares = [ceil(sum(p.numel for p in group) / (2 * num_workers)) * 2 for group in self.groups]
        self.share = sum(self.shares)
        self.frozen_share = sum(self.part(p) for p in self.frozen)

    def touched(self) -> int:
        """Elements of all parameters that lie in a worker's share, or reach into it; of the worker with most."""
        most = [0] * self.num_workers
        for group, share in zip(self.groups, self.shares, strict=True):
            begin = 0
            for each in group:
                for worker in range(begin // share, (begin + each.numel - 1) // share + 1):
                    most[worker] += each.numel
                begin += each.numel
        return max(most)

    def part(self, parameter: Parameter) -> int:
        """Elements of a parameter on each worker under ZeRO-3."""
        return ceil(parameter.numel / self.num_workers)


def _stage_0(sizes: _Sizes, s: Sharding, accumulation: int) -> Iterator[Item]:
    whole = sizes.num_trained
    yield Item("parameters", "device", s.bytes * (whole + sizes.num_frozen), ALWAYS, "whole on every worker")
    if s.bytes < 4:
        yield Item("fp32 masters", "device", 4 * whole, TRAINING, "runtime/fp16/unfused_optimizer.py")
        yield Item("fp32 gradients", "device", 4 * whole, ("update",), "for the masters")
    yield Item(
        "optimizer states",
        "device",
        4 * s.states * whole,
        TRAINING,
        f"{s.states} x fp32, whole on every worker",
    )
    when: tuple[Phase, ...] = ("compute", "update") if accumulation > 1 else ("update",)
    yield Item("gradients", "device", s.bytes * whole, when, "whole on every worker")


def _stage_1_and_2(sizes: _Sizes, s: Sharding, accumulation: int) -> Iterator[Item]:
    whole, share, off = sizes.num_trained, sizes.share, s.offload_optimizer != "none"
    home: Literal["device", "host"] = "host" if off else "device"
    where = f"/ {sizes.num_workers} workers"
    yield Item(
        "parameters",
        "device",
        s.bytes * (share * sizes.num_workers + sizes.num_frozen),
        ALWAYS,
        f"whole on every worker, laid side by side ({STAGE12})",
    )
    yield Item("fp32 masters", home, 4 * share, TRAINING, f"4 bytes {where}, also in fp32 ({STAGE12})")
    yield Item("optimizer states", home, 4 * s.states * share, TRAINING, f"{s.states} x fp32 {where}")
    if off:
        yield Item("fp32 gradients", "host", 4 * share, TRAINING, f"the masters' gradients, kept {where}")
        yield Item("weights to copy", "host", s.bytes * share, TRAINING, "updated weights on their way back")
        copies = 2 * s.bytes * sizes.largest
        yield Item("gradient to copy", "device", copies, TRAINING, "the largest parameter's, twice")
    elif s.gradient_bytes > s.bytes:
        yield Item(
            "gradients", "device", 4 * share, ("compute", "update"), f"own part {where}, in fp32 at once"
        )
        if s.stage == 1:
            yield Item("whole gradients", "device", 4 * whole, ("compute",), "added up in fp32 until reduced")
    else:
        if s.stage == 1 and accumulation > 1:
            yield Item("whole gradients", "device", s.bytes * whole, ("compute",), "whole until reduced")
        # Each gradient is kept whole that the worker needs a part of (copy_grads_in_partition).
        when: tuple[Phase, ...] = ("compute", "update") if s.stage == 2 else ("update",)
        why = f"of all parameters that the own part reaches into ({STAGE12})"
        yield Item("gradients", "device", s.bytes * sizes.touched(), when, why)
        flat = 4 * max(sizes.shares)
        yield Item("fp32 gradients", "device", flat, ("update",), "one group's own part laid side by side")
    buckets = 2 if s.overlap_comm else 1
    # Each full bucket is copied once more to be reduced (allreduce_bucket).
    copies = 1 if whole > s.reduce_bucket and s.stage == 2 else 0
    yield Item(
        "reduce buckets",
        "device",
        s.bytes * (buckets + copies) * s.reduce_bucket,
        ("compute",),
        f"{buckets} x reduce_bucket_size" + (", and one on its way" if copies else ""),
    )


def _stage_3(sizes: _Sizes, s: Sharding, accumulation: int) -> Iterator[Item]:
    share, where = sizes.share, f"/ {sizes.num_workers} workers"
    optimizer = {"none": "device", "cpu": "host", "nvme": None}[s.offload_optimizer]
    weights = {"none": "device", "cpu": "host", "nvme": None}[s.offload_param]
    if weights:
        parts = s.bytes * (share + sizes.frozen_share)
        yield Item("parameters", weights, parts, ALWAYS, f"{s.bytes} bytes {where}")  # type: ignore[arg-type]
    if s.hpz > 1:
        second = s.bytes * ceil((sizes.num_trained + sizes.num_frozen) / s.hpz)
        yield Item("second copy (hpZ)", "device", second, TRAINING, f"whole in every {s.hpz} workers")
    if optimizer:
        place: Literal["device", "host"] = optimizer  # type: ignore[assignment]
        # Also in fp32: DeepSpeed compares a device with its name, and so never shares the weights' memory.
        yield Item("fp32 masters", place, 4 * share, TRAINING, f"4 bytes {where} ({STAGE3})")
        yield Item("optimizer states", place, 4 * s.states * share, TRAINING, f"{s.states} x fp32 {where}")
    yield Item(
        "gradients",
        "device" if s.offload_optimizer == "none" else "host",
        s.gradient_bytes * share,
        TRAINING,
        f"own part {where}: one buffer (grad_partitions_flat_buffer, {STAGE3})",
    )
    largest = min(max(sizes.shares), s.sub_group)
    if optimizer == "host":
        yield Item("fp32 gradients", "host", 4 * share, TRAINING, f"the masters' gradients, kept {where}")
    else:
        yield Item("fp32 gradients", "device", 4 * largest, ("update",), "of one sub-group at a time")
    yield Item("reduce bucket", "device", s.bytes * s.reduce_bucket, TRAINING, "reduce_bucket_size")
    whole = live.whole(
        [each.numel for each in sizes.shapes.parameters],
        sizes.shapes.visits,
        persistence=s.persistence,
        max_reuse=s.max_reuse,
        prefetch=s.prefetch,
        max_live=s.max_live,
    )
    yield Item(
        "small parameters", "device", s.bytes * whole.always, TRAINING, "never let go: persistence threshold"
    )
    yield Item(
        "gathered parameters",
        "device",
        s.bytes * whole.most,
        ("compute",),
        "whole while they are used, fetched ahead, or used again soon (partitioned_param_coordinator.py)",
    )


def _coming(items: list[Item], accumulation: int) -> int:
    """Bytes of a ZeRO-1 or 2 worker that are not there before a step's first gradient is (setup_buckets)."""
    names = {"reduce buckets"} | ({"gradients"} if accumulation == 1 else set())
    return sum(
        i.bytes for i in items if i.name in names and i.phases in (("compute",), ("compute", "update"))
    )


def _computing(sizes: _Sizes, s: Sharding, trace: Trace, accumulation: int, coming: int) -> Iterator[Item]:
    """Activations and outputs at the peak of forward and backward.

    Args:
        coming: bytes of other items that come with the first gradient, when outputs may be gone.
    """
    # Whole gradients come while activations go, where they are not there from the micro-batch before.
    is_whole = s.stage == 0 or (s.stage == 1 and not s.overlap_comm)
    comes = is_whole and accumulation == 1
    rest = max(trace.peak(s.bytes if comes else 0, coming), coming) - coming
    if s.stage == 0:
        # At the end whole gradients are laid side by side (runtime/engine.py, buffered_allreduce_fallback).
        laid = s.bytes * min(sizes.num_trained, 500_000_000)
        rest = max(rest, laid + (s.bytes * sizes.num_trained if comes else 0))
    names = {
        "activations": (trace.held, "kept for the backward (traced)"),
        "outputs and loss": (trace.outputs, "logits and what the loss keeps"),
        "backward's own": (rest, "gradients of activations and outputs at the peak"),
    }
    for name, (most, why) in names.items():
        yield Item(name, "device", min(most, rest), ("compute",), why)
        rest -= min(most, rest)


def _updating(sizes: _Sizes, s: Sharding, device: str, kept: int) -> Iterator[Item]:
    """What the update takes for a moment.

    Args:
        kept: bytes of gradients that are there in the update and gone when it ends.
    """
    if not sizes.trained:
        return
    largest, whole = max(each.numel for each in sizes.trained), max(sizes.shares) * sizes.num_workers
    moments: dict[str, int] = {}
    stepped = largest if s.stage == 0 else min(max(sizes.shares), s.sub_group if s.stage == 3 else whole)
    if s.stage and s.offload_optimizer == "none":
        # One gradient after the other (runtime/zero/utils.py, get_norm_dtype), before they lie side by side.
        own = ceil(largest / sizes.num_workers) if s.stage == 3 else min(largest, stepped)
        moments["a gradient in fp64, for its norm"] = 8 * own - 4 * stepped
    if s.adam_is_torch and s.states == 2:
        moments["two temporaries of torch's AdamW"] = 8 * stepped
    if s.stage in (1, 2) and device == "cpu":
        # NCCL gathers in place (all_gather_into_tensor_dp_groups), gloo into a copy.
        moments["updated weights as gloo gathers them"] = s.bytes * whole - kept
    if moments:
        why = max(moments, key=lambda name: moments[name])
        yield Item("update's own", "device", moments[why], ("update",), why)


def _around(sizes: _Sizes, s: Sharding, device: str) -> Iterator[Item]:
    """Buffers of the model, the framework, and what loading, saving and exporting take."""
    yield Item("model's buffers", "device", sizes.shapes.buffers, ALWAYS, "what is no parameter")
    if device == "cuda":
        yield Item(
            "framework", "device", GPU_FRAMEWORK, ALWAYS, "CUDA context, NCCL, workspaces: an assumption"
        )
    if s.offload_optimizer == "none":
        # Without ZeRO all ranks hold the same and share the writing.
        share = sizes.share if s.stage else ceil(sizes.num_trained / sizes.num_workers)
        why = "what a thread writes while training goes on; from the first checkpoint on (train/writer.py)"
        yield Item(CHECKPOINT_COPY, "host", 4 * (1 + s.states) * share, TRAINING, why)
    if s.stage == 3:
        # transformers' integrations/deepspeed.py loads module by module; what rank 0 reads of the files is mapped.
        copies = 2 if device == "cpu" else 1
        why = "gathered one at a time" + (", by gloo into a copy" if copies == 2 else "")
        yield Item("one whole parameter", "device", copies * s.bytes * sizes.largest, ("load", "export"), why)
        if device == "cuda" and s.offload_param == "none":
            why = "the own part goes through the host once (runtime/zero/utils.py, defragment)"
            yield Item("weights as loaded", "host", s.bytes * sizes.share, ("load",), why)
        return
    whole = s.bytes * (sizes.num_trained + sizes.num_frozen)
    if device == "cuda" and sizes.shapes.is_converted:
        why = "each worker has its own until it moves to the GPU, since the files hold another dtype"
        yield Item("weights as loaded", "host", whole, ("load",), why)
    if device == "cpu" and s.stage:
        # On a GPU without room for it the host has it instead (flatten_on_accelerator).
        why = f"a group of parameters beside the copy that lays them side by side ({STAGE12})"
        yield Item(
            "weights as loaded",
            "device",
            s.bytes * max(sizes.shares, default=0) * sizes.num_workers,
            ("load",),
            why,
        )
