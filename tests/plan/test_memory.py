"""The forecast's arithmetic against known facts: ZeRO's published shares, models that are known to fit or not."""

from dataclasses import replace

import pytest

from launcher.plan import cluster, ds_memory, forecast, live, memory, zero
from launcher.plan.need import Item, Need
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts, World, make_plan
from launcher.plan.shapes import Parameter, Shapes, Trace, deeper, frontier
from launcher.recipe import parse
from tests.conftest import ROOT

BILLION = 10**9


def _shapes(billions: float, layers: int = 32) -> Shapes:
    """A model of so many parameters in equal layers, with next to no activations."""
    each = int(billions * BILLION / layers)
    trace = Trace(rows=1, length=1, held=0, outputs=0, curve=((0, 0),), flops=1)
    return Shapes(
        parameters=tuple(Parameter(f"layers.{i}", each, 0) for i in range(layers)),
        visits=tuple((i,) for i in range(layers)),
        buffers=0,
        plain=trace,
        checkpointed=trace,
    )


def _forecast(shapes: Shapes, ds: str, machines: str) -> forecast.Forecast:
    tree = {
        "model": {"config": {"model_type": "llama", "hidden_size": 4096}, "tokenizer": "unused"},
        "stages": [
            {
                "name": "only",
                "task": "causal-lm",
                "data": {"train": "rows.jsonl"},
                "micro_batch": 1,
                "global_batch": 64,
                "steps": 10,
            }
        ],
    }
    split = SplitFacts(about_rows=1000, num_samples=1000, is_settled=True)
    there = cluster.parse(machines)
    config = zero.load(str(ROOT / "ds_configs" / f"{ds}.json"))
    plan = make_plan(
        parse(tree),
        config,
        ds,
        ModelFacts(hidden_size=4096),
        (StageFacts(train=split, eval=None),),
        World(num_workers=there.num_workers, device=there.device),
    )
    return forecast.of_stage(plan.stages[0], shapes, there, plan.dtype)


def _states(found: forecast.Forecast) -> int:
    names = ("parameters", "gradients", "fp32 masters", "optimizer states")
    return sum(item.bytes for item in found.need.items if item.name in names)


def test_mixed_precision_adam_takes_16_bytes_a_parameter_and_zero_3_divides_them_all() -> None:
    shapes = _shapes(7)
    assert _states(_forecast(shapes, "zero3", "1xH100")) == pytest.approx(16 * 7e9, rel=0.01)
    assert _states(_forecast(shapes, "zero3", "8x8xH100")) == pytest.approx(16 * 7e9 / 64, rel=0.01)


def test_published_shares_of_zero_1_and_2() -> None:
    # Rajbhandari et al. (2020), figure 1: 7.5 B parameters on 64 GPUs take 31.4, 16.6 and 1.9 GB. The
    # gradients that ZeRO-1 keeps are in the trace's curve; ZeRO-2's reduced ones are states.
    shapes = _shapes(7.5)
    one, two, three = (_forecast(shapes, f"zero{n}", "8x8xH100") for n in (1, 2, 3))
    assert _states(one) + 2 * 7.5e9 == pytest.approx(31.4e9, rel=0.02)
    assert _states(two) == pytest.approx(16.6e9, rel=0.02)
    assert _states(three) == pytest.approx(1.9e9, rel=0.02)


def test_what_is_known_to_fit_and_not_to_fit() -> None:
    assert _forecast(_shapes(13), "zero3", "8xA100-80GB").fits
    assert not _forecast(_shapes(7), "zero3", "1xA100-80GB").fits
    offloaded = _forecast(_shapes(7), "zero3_offload", "1xA100-80GB,host=500GB")
    assert offloaded.fits and offloaded.host_bytes > 12 * 7e9
    small_host = _forecast(_shapes(7), "zero3_offload", "1xA100-80GB,host=64GB")
    assert not small_host.fits and small_host.lacks("host") > 0 >= small_host.lacks("device")


def test_whole_parameters_under_zero_3() -> None:
    numels, visits = [100] * 10, [(i,) for i in range(10)]

    def whole(
        persistence: int = 0, max_reuse: int = 0, prefetch: int = 0, max_live: int = 10**9
    ) -> live.Whole:
        return live.whole(
            numels,
            visits,
            persistence=persistence,
            max_reuse=max_reuse,
            prefetch=prefetch,
            max_live=max_live,
        )

    # Nothing is kept between uses and nothing fetched ahead: one at a time.
    assert whole() == live.Whole(0, 0, 100)
    # The last ones are used again within so many elements.
    assert 200 <= whole(max_reuse=450).at_turn <= 300
    assert whole(max_reuse=10**9) == live.Whole(0, 1000, 1000)
    assert whole(persistence=100) == live.Whole(1000, 0, 0)
    # Two more are fetched with each that is used, so the look ahead is soon far ahead.
    assert whole(prefetch=150).most == 1000
    assert whole(prefetch=150, max_live=400).most <= 500
    # A parameter is fetched whole, however little is asked for.
    assert whole(prefetch=1).most >= 200


def test_deeper_models_follow_from_shallow_ones() -> None:
    def of(layers: int) -> Trace:
        # Each layer holds 10 bytes and has 5 elements; the outputs take 7 at the turn.
        backward = [(10 * (layers - k) + 7 * (k == 0), 5 * k) for k in range(layers + 1)]
        return Trace(
            rows=1,
            length=1,
            held=10 * layers,
            outputs=7,
            curve=frontier(backward),
            flops=100 * layers,
        )

    found, whole = deeper(of(2), of(4), 10), of(24)
    assert (found.held, found.outputs, found.flops) == (whole.held, whole.outputs, whole.flops)
    for gradient_bytes in (0, 1, 2, 4):
        assert found.peak(gradient_bytes) == whole.peak(gradient_bytes)


def test_settings_are_read_with_deepspeeds_defaults() -> None:
    found = ds_memory.sharding({"zero_optimization": {"stage": 3}}, "bf16")
    assert (found.bytes, found.gradient_bytes, found.states) == (2, 2, 2)
    assert (found.reduce_bucket, found.max_reuse, found.offload_optimizer) == (500_000_000, 10**9, "none")
    old = ds_memory.sharding({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "fp16")
    assert old.offload_optimizer == "cpu" and not old.overlap_comm


def test_need_adds_up_and_names_what_is_largest() -> None:
    need = Need(
        (
            Item("a", "device", 5, ("load", "compute"), ""),
            Item("b", "device", 7, ("compute",), ""),
            Item("c", "host", 9, ("update",), ""),
        )
    )
    assert (need.at("load"), need.at("compute", "device"), need.peak("device")) == (5, 12, (12, "compute"))
    assert (need.tightest("device").name, need.tightest("host").name) == ("b", "c")


def _need(ds: str, machines: str, shapes: Shapes) -> Need:
    return _forecast(shapes, ds, machines).need


def test_what_loading_takes_on_the_host() -> None:
    same, other = _shapes(1), replace(_shapes(1), is_converted=True)
    for ds in ("zero0", "zero1", "zero2"):
        # Files of the same dtype are mapped, and go to the GPU from there.
        assert _need(ds, "8xH100", same).at("load", "host") == 0
        assert _need(ds, "8xH100", other).at("load", "host") == pytest.approx(2e9, rel=0.01)
    for shapes in (same, other):
        assert _need("zero3", "8xH100", shapes).at("load", "host") == pytest.approx(2e9 / 8, rel=0.01)


def test_what_loading_takes_on_the_device() -> None:
    shapes, layer = _shapes(1, layers=20), BILLION // 20
    framework = memory.GPU_FRAMEWORK
    whole = _need("zero2", "8xH100", shapes).at("load", "device") - framework
    share = _need("zero3", "8xH100", shapes).at("load", "device") - framework
    assert whole == pytest.approx(2e9, rel=0.01)
    assert share == pytest.approx(2e9 / 8 + 2 * layer, rel=0.01)


def test_zero_2_keeps_gradients_of_parameters_that_two_workers_share() -> None:
    # Three equal parameters, cut in two: the middle one's gradient is kept whole by both.
    shapes = _shapes(0.3, layers=3)
    gradients = next(i for i in _need("zero2", "2xH100", shapes).items if i.name == "gradients")
    assert gradients.bytes == 2 * 200_000_000


def test_what_comes_with_the_first_gradient_does_not_meet_the_outputs() -> None:
    trace = Trace(rows=1, length=1, held=10, outputs=5, curve=((15, 0), (9, 3)), flops=1)
    assert (trace.peak(0), trace.peak(0, 4), trace.peak(0, 8), trace.peak(1, 8)) == (15, 15, 17, 20)
