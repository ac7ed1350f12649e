"""What a step's exchanges come to: bytes by ZeRO stage, calls, and seconds over links of known speed."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.plan import cluster, ds_memory, pace, traffic
from launcher.plan.ds_memory import Sharding
from launcher.plan.shapes import Parameter, Shapes, Trace

LAYERS, EACH = 10, 1_000_000
ALL = LAYERS * EACH
ONE_BY_ONE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def _shapes(frozen: int = 0) -> Shapes:
    trace = Trace(rows=1, length=1, held=0, outputs=0, curve=((0, 0),), flops=1)
    return Shapes(
        parameters=tuple(
            Parameter(f"layers.{i}.weight", EACH, None if i < frozen else 0) for i in range(LAYERS)
        ),
        visits=tuple((i,) for i in range(LAYERS)),
        buffers=0,
        plain=trace,
        checkpointed=None,
    )


class _Plan:
    """What traffic asks of a stage's plan."""

    def __init__(self, num_workers: int, accumulation: int = 1, recomputes: bool = False) -> None:
        self.num_workers, self.accumulation, self.recomputes = num_workers, accumulation, recomputes


def _settings(stage: int, dtype: str = "bf16", **zero: Any) -> Sharding:
    return ds_memory.sharding({"zero_optimization": {"stage": stage, **zero}}, dtype)


def _of(
    stage: int, workers: int, accumulation: int = 1, frozen: int = 0, **zero: Any
) -> tuple[traffic.Exchange, ...]:
    plan: Any = _Plan(workers, accumulation)
    return traffic.of_step(_shapes(frozen), _settings(stage, **zero), plan)


def _weights(exchanges: tuple[traffic.Exchange, ...], device: str = "cuda") -> float:
    """Bytes sent, in units of all weights once over to all others."""
    num = exchanges[0].ranks
    return traffic.sent_bytes(exchanges, device) / (2 * ALL * (num - 1) / num)


def test_bytes_of_a_step() -> None:
    # Rajbhandari et al. (2020), section 7, count 2 for data parallelism and 3 for ZeRO-3. Of ZeRO-1 and 2 they
    # count 2, which DeepSpeed sends only where it reduces for each owner apart.
    assert _weights(_of(0, 8)) == pytest.approx(2, rel=1e-4)
    assert _weights(_of(1, 8)) == _weights(_of(2, 8)) == pytest.approx(3, rel=1e-4)
    by_owner = {"use_multi_rank_bucket_allreduce": False}
    assert _weights(_of(2, 8, **by_owner)) == pytest.approx(2, rel=1e-4)
    assert _weights(_of(3, 8, **ONE_BY_ONE)) == pytest.approx(3, rel=0.12)
    # A model that is soon used again is gathered once.
    assert _weights(_of(3, 8)) == pytest.approx(2, rel=1e-4)
    assert _of(3, 1) == ()


def test_bytes_with_accumulation_and_frozen_weights() -> None:
    assert _weights(_of(1, 8, 4)) == pytest.approx(3, rel=1e-4)
    assert _weights(_of(2, 8, 4)) == pytest.approx(4 * 2 + 1, rel=1e-4)
    assert _weights(_of(3, 8, 4)) == pytest.approx(4 * 2, rel=1e-4)
    # Frozen ones are gathered, and have no gradients.
    assert _weights(_of(3, 8, frozen=5)) == pytest.approx(1.5, rel=1e-4)
    assert _weights(_of(2, 8, frozen=5)) == pytest.approx(1.5, rel=1e-4)


def test_gloo_reduces_the_whole() -> None:
    assert _weights(_of(3, 8), "cpu") == pytest.approx(3, rel=1e-4)


def test_hpz_gathers_from_all_once_and_then_in_a_group() -> None:
    found = _of(3, 16, 2, **ONE_BY_ONE, zero_hpz_partition_size=8)
    by = {(each.what, each.ranks): each.bytes / (2 * ALL) for each in found}
    assert by["weights", 16] == 1 and by["weights in a group", 8] == 1
    assert by["weights again", 8] == pytest.approx(2, rel=0.12)
    assert by["gradients", 16] == 2


def test_layers_that_are_computed_again_are_gathered_again_unless_they_stay() -> None:
    def gathered(**zero: Any) -> float:
        plan: Any = _Plan(8, recomputes=True)
        found = traffic.of_step(_shapes(), _settings(3, **zero), plan)
        return sum(each.bytes for each in found if each.kind == "all_gather") / (2 * ALL)

    assert gathered(**ONE_BY_ONE) == pytest.approx(3, rel=0.11)
    assert gathered(stage3_max_reuse_distance=2 * EACH, stage3_prefetch_bucket_size=0) == pytest.approx(
        2, rel=0.11
    )


def test_small_weights_stay_and_are_gathered_after_the_update() -> None:
    found = _of(3, 8, stage3_param_persistence_threshold=EACH)
    kinds = {each.what: (each.phase, each.calls) for each in found}
    assert kinds["small weights"] == ("update", LAYERS)
    assert "weights" not in kinds


def test_calls_follow_from_buckets() -> None:
    def calls(**zero: Any) -> dict[str, int]:
        return {each.what: each.calls for each in _of(3, 8, **zero)}

    assert calls(reduce_bucket_size=3 * EACH)["gradients"] == 4
    assert calls(reduce_bucket_size=1)["gradients"] == LAYERS
    small, large = (calls(stage3_prefetch_bucket_size=size)["weights"] for size in (EACH, ALL))
    assert small > large >= 2


def test_seconds_of_an_exchange() -> None:
    gather = traffic.Exchange(
        what="weights", kind="all_gather", phase="forward", bytes=1e9, calls=10, ranks=16
    )
    machines = cluster.parse("2x8xH100,net=400Gb")
    sent_s, waits_s = pace.seconds(gather, machines)
    # All that goes round leaves each node once, whatever the number of its GPUs: 15/16 of it at 50 GB/s.
    assert sent_s == pytest.approx(15 / 16 * 1e9 / 50e9)
    assert waits_s == pytest.approx(10 * (8.4e-6 + 14 * 3.4e-6 + 9.6e-6))
    # In one node the links between its GPUs count.
    sent_s, _ = pace.seconds(replace(gather, ranks=8), machines)
    assert sent_s == pytest.approx(7 / 8 * 1e9 / 450e9)


def test_what_runs_beside_the_arithmetic() -> None:
    machines = cluster.parse("2x8xH100,net=400Gb")

    def of(stage: int, work_s: float, **zero: Any) -> pace.Pace:
        exchanges = _of(stage, 16, **zero)
        return pace.of_step(exchanges, _settings(stage, **zero), machines, work_s=work_s)

    # With work enough only the edges are seen; with none the links are all there is.
    busy, idle = of(3, 10.0), of(3, 0.0)
    assert busy.step_s == pytest.approx(10, rel=1e-3) and busy.limit == "work"
    assert idle.step_s >= idle.bandwidth_s and idle.limit in ("bandwidth", "latency")
    # Reductions wait for their turn where nothing overlaps; the gather after the update always does.
    assert (
        of(2, 1.0, overlap_comm=False, reduce_bucket_size=EACH).waits_s
        > of(2, 1.0, overlap_comm=True, reduce_bucket_size=EACH).waits_s
        > 0
    )


def test_a_slow_network_makes_a_step_longer_in_proportion() -> None:
    exchanges, settings = _of(2, 2), _settings(2, "fp32")
    fast, slow = (
        replace(cluster.parse("2xCPU"), num_nodes=2, workers_per_node=1, node_bandwidth=rate)
        for rate in (1e9, 1e8)
    )
    times = [pace.of_step(exchanges, settings, each, work_s=0.0).step_s for each in (fast, slow)]
    assert 9 < times[1] / times[0] < 10
