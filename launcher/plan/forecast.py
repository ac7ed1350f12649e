"""What a stage will need and cost on a cluster, and whether it fits: arithmetic on what was traced."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from launcher.plan import memory, pace, traffic
from launcher.plan.cluster import Cluster
from launcher.plan.ds_memory import Sharding, sharding
from launcher.plan.need import PHASES, Need
from launcher.plan.pace import Pace
from launcher.plan.plan import StagePlan
from launcher.plan.shapes import Shapes, Trace
from launcher.plan.zero import Dtype

DEVICE_SHARE, HOST_SHARE = 0.94, 0.9
"""What of a device's and a host's memory can be planned with: the allocator cannot use every byte, and a host
has other work."""
MFU = 0.4
"""The share of a GPU's peak that a well-fed model reaches: assumed."""
CPU_FLOPS = 5e10
"""Of one core: what fine-tuning reaches in fp32."""
CPU_ADAM_BYTES_S = 2e10
"""Bytes of optimizer states that a host updates in a second: assumed; Adam on a CPU is bound by memory."""
PCIE_BYTES_S = 2.5e10
NVME_BYTES_S = 5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One stage on one cluster.

    Attributes:
        need: bytes by item, for each worker.
        device_bytes, host_bytes: at the peak: of one device; of one host, for all of its workers.
        device_room, host_room: what there is to plan with; None: unknown.
        checkpoint_bytes: of one checkpoint, over all workers.
        export_bytes: of the exported model.
        sent_bytes: that each worker sends in a step.
        flops: of one step, over all workers.
        token_flops: of the model for one token, forward and backward, without recomputation: of all but attention's own
            products, and of these in a sample as long as the longest.
        work_s: seconds of a step's arithmetic, about; None: unknown.
        pace: of a step, about; None: unknown.
        num_steps: of the stage.
    """

    name: str
    device: Literal["cpu", "cuda"]
    need: Need
    device_bytes: int
    host_bytes: int
    device_room: int | None
    host_room: int | None
    checkpoint_bytes: int
    export_bytes: int
    sent_bytes: int
    flops: int
    token_flops: tuple[float, float]
    work_s: float | None
    pace: Pace | None
    num_steps: int
    tokens_per_step: int

    @property
    def fits(self) -> bool:
        """Whether it fits; what is unknown is taken to."""
        return self.lacks("device") <= 0 and self.lacks("host") <= 0

    def lacks(self, place: Literal["device", "host"]) -> int:
        """Return the bytes that are missing at a place; 0 or less: none."""
        room = self.device_room if place == "device" else self.host_room
        used = self.device_bytes if place == "device" else self.host_bytes
        return used - room if room is not None else 0

    @property
    def of_worker(self) -> dict[str, int | None]:
        """Bytes of each worker at the peak: `device`, None where it has no GPU, and `host`."""
        if self.device == "cpu":
            return {"device": None, "host": max(self.need.at(phase) for phase in PHASES)}
        return {"device": self.device_bytes, "host": self.need.peak("host")[0]}

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, about."""
        return None if self.pace is None else self.pace.step_s

    @property
    def total_s(self) -> float | None:
        """Seconds of all steps, about."""
        return None if self.step_s is None else self.step_s * self.num_steps


def of_stage(plan: StagePlan, shapes: Shapes, cluster: Cluster, dtype: Dtype) -> Forecast:
    """Forecast a stage.

    Args:
        plan: of the stage, for as many workers as the cluster has.
        shapes: of its model, traced for this micro-batch or another.
        cluster: the machines.
        dtype: of the weights.
    """
    settings, trace = sharding(plan.ds, dtype), traced(plan, shapes)
    need = memory.of_stage(
        shapes,
        trace,
        settings,
        num_workers=plan.num_workers,
        accumulation=plan.accumulation,
        device=cluster.device,
    )
    device, host = need.peak("device")[0], need.peak("host")[0]
    per_node = min(cluster.workers_per_node, plan.num_workers)
    on_host = per_node * host
    gpu = cluster.accelerator
    if gpu is None:
        # Without GPUs all of it is the host's.
        on_host = per_node * max(need.at(phase) for phase in PHASES)
    work = _work_s(plan, trace, cluster, dtype)
    return Forecast(
        name=plan.name,
        device=cluster.device,
        need=need,
        device_bytes=device,
        host_bytes=on_host,
        device_room=_room(gpu.memory_bytes if gpu else None, DEVICE_SHARE),
        host_room=_room(cluster.host_bytes, HOST_SHARE),
        checkpoint_bytes=_checkpoint_bytes(shapes, settings),
        export_bytes=settings.bytes * (shapes.num_trained + shapes.num_frozen),
        sent_bytes=traffic.sent_bytes(traffic.of_step(shapes, settings, plan), cluster.device),
        flops=trace.flops * plan.accumulation * plan.num_workers,
        token_flops=_token_flops(shapes.plain),
        work_s=work,
        pace=None if work is None else _pace(plan, settings, shapes, cluster, work),
        num_steps=plan.num_steps,
        tokens_per_step=plan.units_per_step * plan.max_length,
    )


def total_s(forecasts: Sequence[Forecast]) -> float:
    """Return the seconds of all stages' steps, about; what is unknown counts as none."""
    return sum(each.total_s or 0.0 for each in forecasts)


def disk_bytes(forecasts: Sequence[Forecast], keep: int = 2) -> int:
    """Return the bytes that a run leaves: every stage's export, and the checkpoints of the largest.

    Args:
        forecasts: of its stages.
        keep: checkpoints that are kept.
    """
    checkpoints = max((each.checkpoint_bytes for each in forecasts), default=0)
    return keep * checkpoints + sum(each.export_bytes for each in forecasts)


def traced(plan: StagePlan, shapes: Shapes) -> Trace:
    """Return the trace of a plan's micro-batch."""
    trace = shapes.checkpointed if plan.recomputes and shapes.checkpointed else shapes.plain
    return trace if trace.rows == plan.micro_batch else trace.scaled(plan.micro_batch)


def _token_flops(trace: Trace) -> tuple[float, float]:
    slots, attention = trace.rows * trace.length, trace.attention_flops
    return (trace.flops - attention) / slots, attention / slots


def _checkpoint_bytes(shapes: Shapes, s: Sharding) -> int:
    # Masters and the optimizer's states; weights follow from the masters, and what is frozen from the model.
    return 4 * (1 + s.states) * shapes.num_trained


def _room(total: int | None, share: float) -> int | None:
    return None if total is None else int(total * share)


def _work_s(plan: StagePlan, trace: Trace, cluster: Cluster, dtype: Dtype) -> float | None:
    """Seconds of a step's arithmetic on one worker."""
    if cluster.accelerator is None:
        return trace.flops * plan.accumulation / CPU_FLOPS
    peak = cluster.accelerator.tflops(dtype)
    return None if peak is None else trace.flops * plan.accumulation / (MFU * peak * 1e12)


def _offload_s(plan: StagePlan, s: Sharding, shapes: Shapes, cluster: Cluster) -> float:
    """Seconds that offloading adds to a step."""
    share, moved = ceil(shapes.num_trained / plan.num_workers), 0.0
    if s.offload_optimizer != "none":
        on_host = share * min(cluster.workers_per_node, plan.num_workers)
        # Gradients down, weights up; then masters, gradients and both moments are read, and written back.
        moved += 2 * s.bytes * share / PCIE_BYTES_S + 28 * on_host / CPU_ADAM_BYTES_S
        if s.offload_optimizer == "nvme":
            moved += 24 * on_host / NVME_BYTES_S
    if s.offload_param != "none":
        moved += 2 * plan.accumulation * s.bytes * share / PCIE_BYTES_S
    return moved


def _pace(plan: StagePlan, s: Sharding, shapes: Shapes, cluster: Cluster, work: float) -> Pace:
    return pace.of_step(
        traffic.of_step(shapes, s, plan),
        s,
        cluster,
        work_s=work,
        forward_share=1 / 4 if plan.recomputes and not plan.keeps_products else 1 / 3,
        rounds=plan.accumulation,
        offload_s=_offload_s(plan, s, shapes, cluster),
    )
