"""What a stage needs on each worker and on each host, by item and phase: bytes, and why.

The formulas are read off DeepSpeed 0.19.8; each item names where. They hold for one worker, which is one GPU,
or one process where there are none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from launcher.plan import live
from launcher.plan.ds_memory import Sharding
from launcher.plan.shapes import Parameter, Shapes, Trace

Phase = Literal["load", "compute", "update", "save", "export"]
PHASES: tuple[Phase, ...] = ("load", "compute", "update", "save", "export")
ALWAYS = PHASES
TRAINING: tuple[Phase, ...] = ("compute", "update", "save", "export")
STAGE3 = "deepspeed/runtime/zero/stage3.py"
STAGE12 = "deepspeed/runtime/zero/stage_1_and_2.py"
GPU_FRAMEWORK = 1_500_000_000
"""CUDA context, NCCL's buffers, workspaces of cuBLAS: not measured here."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory.

    Attributes:
        place: on the device of a worker, or in its host's memory, for each worker.
        bytes: while it is there.
        phases: in which it is there.
        why: the formula, and where it comes from.
    """

    name: str
    place: Literal["device", "host"]
    bytes: int
    phases: tuple[Phase, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Need:
    """All items of a stage, for one worker."""

    items: tuple[Item, ...]

    def at(self, phase: Phase, place: str | None = None) -> int:
        """Return the bytes in use in a phase, on the device or the host; by default on both."""
        return sum(i.bytes for i in self.items if phase in i.phases and place in (None, i.place))

    def peak(self, place: str) -> tuple[int, Phase]:
        """Return the most bytes in use at a place, and in which phase."""
        return max((self.at(phase, place), phase) for phase in PHASES)

    def tightest(self, place: str) -> Item:
        """Return the largest item of the phase that needs most."""
        phase = self.peak(place)[1]
        return max((i for i in self.items if i.place == place and phase in i.phases), key=lambda i: i.bytes)


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
    items = [*make(sizes, sharding, accumulation), *_computing(sizes, sharding, trace, accumulation)]
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
        if sharding.stage == 3:
            # Each parameter is cut into equal parts, and padded to them.
            self.shares = [sum(self.part(p) for p in group) for group in groups.values()]
        else:
            # A whole group is cut; parts begin at multiples of two elements.
            self.shares = [
                ceil(sum(p.numel for p in group) / (2 * num_workers)) * 2 for group in groups.values()
            ]
        self.share = sum(self.shares)
        self.frozen_share = sum(self.part(p) for p in self.frozen)

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
    bucket = min(whole, 500_000_000)
    yield Item(
        "all-reduce buffer",
        "device",
        s.bytes * bucket,
        ("update",),
        "gradients laid side by side, up to 500 M elements (runtime/engine.py, buffered_allreduce_fallback)",
    )


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
    elif s.stage == 2:
        yield Item(
            "gradients", "device", s.gradient_bytes * share, ("compute", "update"), f"own part {where}"
        )
        yield Item("fp32 gradients", "device", 4 * share, ("update",), "the own part laid side by side")
    else:
        if accumulation > 1:
            yield Item("gradients", "device", s.bytes * whole, ("compute",), "whole until reduced")
        yield Item("reduced gradients", "device", s.gradient_bytes * share, ("update",), f"own part {where}")
        yield Item("fp32 gradients", "device", 4 * share, ("update",), "the own part laid side by side")
    buckets = 2 if s.overlap_comm else 1
    yield Item(
        "reduce buckets",
        "device",
        buckets * s.bytes * s.reduce_bucket,
        ("compute",),
        f"{buckets} x reduce_bucket_size",
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
    always, most = live.most_whole(
        [each.numel for each in sizes.shapes.parameters],
        sizes.shapes.visits,
        persistence=s.persistence,
        max_reuse=s.max_reuse,
        prefetch=s.prefetch,
    )
    yield Item(
        "small parameters", "device", s.bytes * always, TRAINING, "never let go: persistence threshold"
    )
    yield Item(
        "gathered parameters",
        "device",
        s.bytes * most,
        ("compute",),
        "whole while they are used, or used again within max_reuse_distance",
    )


def _computing(sizes: _Sizes, s: Sharding, trace: Trace, accumulation: int) -> Iterator[Item]:
    """Activations and outputs at the peak of forward and backward."""
    # Whole gradients come while activations go, where they are not there from the micro-batch before.
    comes = s.stage < 2 and accumulation == 1 and s.offload_optimizer == "none"
    peak = trace.peak(s.bytes if comes else 0)
    yield Item("activations", "device", trace.held, ("compute",), "kept for the backward (traced)")
    yield Item("outputs and loss", "device", trace.outputs, ("compute",), "logits and what the loss keeps")
    rest = max(0, peak - trace.held - trace.outputs)
    yield Item(
        "backward's own", "device", rest, ("compute",), "gradients of activations and outputs at the peak"
    )
    if s.adam_is_torch and s.states == 2:
        largest = max(sizes.shares) if s.stage else max(each.numel for each in sizes.trained)
        yield Item("update's own", "device", 8 * largest, ("update",), "two temporaries of torch's AdamW")


def _around(sizes: _Sizes, s: Sharding, device: str) -> Iterator[Item]:
    """Buffers of the model, the framework, and what loading, saving and exporting take."""
    yield Item("model's buffers", "device", sizes.shapes.buffers, ALWAYS, "what is no parameter")
    if device == "cuda":
        yield Item(
            "framework", "device", GPU_FRAMEWORK, ALWAYS, "CUDA context, NCCL, workspaces: an assumption"
        )
    yield Item(
        "one whole parameter", "device", s.bytes * sizes.largest, ("export",), "gathered one at a time"
    )
