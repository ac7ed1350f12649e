"""What of a completed ds config decides memory, with DeepSpeed's own defaults (runtime/zero/config.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.plan import offload
from launcher.plan.offload import Place

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# States that an optimizer keeps for each parameter, in fp32 elements.
STATES = {"adam": 2, "adamw": 2, "lion": 1, "sgd": 0, "adagrad": 1, "muon": 1, "fusedadam": 2, "lamb": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The settings.

    Attributes:
        stage: of ZeRO.
        bytes: of one element of the weights.
        gradient_bytes: of one element where gradients are added up.
        states: fp32 elements that the optimizer keeps for each parameter.
        adam_is_torch: whether torch's own optimizer makes the update, not fused, which needs room for it.
        offload_optimizer, offload_param: where to.
        reduce_bucket, allgather_bucket, prefetch, persistence, max_reuse, max_live, sub_group: elements.
        hpz: ranks that share a second copy of the weights (ZeRO++).
        sent_bytes: of one element of a gradient as it is sent.
        reduces_whole: whether ZeRO-1 and 2 reduce buckets for all ranks at once, by all-reduce.
        reduces_parts: whether ZeRO-3 reduces by reduce-scatter.
    """

    stage: int
    bytes: int
    gradient_bytes: int
    states: int
    adam_is_torch: bool
    offload_optimizer: Place
    offload_param: Place
    overlap_comm: bool
    reduce_bucket: int
    allgather_bucket: int
    prefetch: int
    persistence: int
    max_reuse: int
    max_live: int
    sub_group: int
    hpz: int
    sent_bytes: int
    reduces_whole: bool
    reduces_parts: bool


def sharding(ds: Mapping[str, Any], dtype: str) -> Sharding:
    """Read a completed ds config.

    Args:
        ds: what `zero.complete` returned.
        dtype: of the weights: fp32, bf16 or fp16.
    """
    section = ds.get("zero_optimization") or {}
    stage = int(section.get("stage") or 0)
    optimizer = ds.get("optimizer") or {}
    name, params = str(optimizer.get("type", "AdamW")).lower(), optimizer.get("params") or {}
    accumulated = (ds.get("data_types") or {}).get("grad_accum_dtype") or dtype
    overlap = section.get("overlap_comm")
    scatters = bool(section.get("reduce_scatter", True))
    # With sequence parallelism ZeRO-1 and 2 send in fp32 (allreduce_bucket).
    in_fp32 = int(ds.get("sequence_parallel_size") or 1) > 1 and stage in (1, 2)
    sent = "fp32" if in_fp32 else ds.get("communication_data_type") or dtype
    return Sharding(
        stage=stage,
        bytes=BYTES[dtype],
        gradient_bytes=BYTES.get(accumulated, BYTES[dtype]),
        states=STATES.get(name, 2),
        adam_is_torch=bool(params.get("torch_adam")) and not params.get("fused"),
        offload_optimizer=offload.place(ds, "offload_optimizer"),
        offload_param=offload.place(ds, "offload_param"),
        overlap_comm=stage == 3 if overlap is None else bool(overlap),
        reduce_bucket=_size(section, "reduce_bucket_size", 500_000_000),
        allgather_bucket=_size(section, "allgather_bucket_size", 500_000_000),
        prefetch=_size(section, "prefetch_bucket_size", 50_000_000),
        persistence=_size(section, "param_persistence_threshold", 100_000),
        max_reuse=_size(section, "max_reuse_distance", 1_000_000_000),
        max_live=_size(section, "max_live_parameters", 1_000_000_000),
        sub_group=_size(section, "sub_group_size", 1_000_000_000),
        hpz=int(section.get("zero_hpz_partition_size") or 1),
        sent_bytes=BYTES.get(sent, BYTES[dtype]),
        reduces_whole=not scatters or bool(section.get("use_multi_rank_bucket_allreduce", True)),
        reduces_parts=scatters,
    )


def _size(section: Mapping[str, Any], name: str, default: int) -> int:
    value = section.get(f"stage3_{name}", section.get(name))
    return int(default if value is None else value)
