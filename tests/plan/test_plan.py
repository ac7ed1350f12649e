"""The plan as a table: the global batch is fixed, the world only changes who runs what."""

import math
from dataclasses import replace
from typing import Literal

import pytest

from launcher import recipe as recipes
from launcher.errors import DataError, DsConfigError, ModelError
from launcher.plan.plan import ModelFacts, Plan, SplitFacts, StageFacts, World, make_plan

TRAIN = SplitFacts(
    about_rows=100, num_samples=100, is_settled=True, is_whole=True, num_tokens=5000, num_packs=30
)
AUTO = {"train_batch_size": "auto", "zero_optimization": {"stage": 3}}


def _plan(
    num_workers: int = 2,
    ds: dict | None = None,
    model: ModelFacts | None = None,
    train: SplitFacts = TRAIN,
    device: Literal["cpu", "cuda"] = "cpu",
    half: Literal["bf16", "fp16"] = "bf16",
    **stage: object,
) -> Plan:
    asked = {"name": "a", "task": "causal-lm", "data": {"train": "x.jsonl"}, **stage}
    recipe = recipes.parse({"model": {"path": "m"}, "stages": [asked]})
    world = World(num_workers=num_workers, device=device, half=half)
    facts = (StageFacts(train=train, eval=None),)
    return make_plan(recipe, ds or AUTO, "ds.json", model or ModelFacts(), facts, world)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 64])
def test_every_world_makes_the_same_steps(num_workers: int) -> None:
    stage = _plan(num_workers, global_batch=24, epochs=2).stages[0]
    # Each epoch ends with a step of its own, of 4 samples.
    assert stage.num_steps == 2 * math.ceil(100 / 24)
    assert stage.accumulation * num_workers * stage.micro_batch >= 24
    assert stage.ds["train_batch_size"] == stage.micro_batch * stage.accumulation * num_workers


@pytest.mark.parametrize(
    ("epochs", "global_batch", "num_steps"),
    [(1, 10, 10), (0.25, 10, 3), (2.5, 30, 10), (0.001, 64, 1), (3, 200, 3)],
)
def test_steps_of_epochs(epochs: float, global_batch: int, num_steps: int) -> None:
    assert _plan(epochs=epochs, global_batch=global_batch).stages[0].num_steps == num_steps


def test_steps_instead_of_epochs() -> None:
    stage = _plan(steps=7, global_batch=16).stages[0]
    assert (stage.num_steps, stage.units_per_step) == (7, 16)


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        # (kind, units of a step, micro-batch, its padded tokens at most)
        ({"global_batch": 1}, "cpu", ("bucketed", 1, 1, 4096)),
        ({"global_batch": 2}, "cpu", ("random", 2, 1, 4096)),
        ({"global_batch": 1}, "cuda", ("bucketed", 1, 1, 4096)),
        ({"global_batch": "2048 tokens"}, "cpu", ("random", 41, 8, 4096)),
        ({"global_batch": "2048 tokens"}, "cuda", ("packed", 4, 2, 4096)),
        ({"global_batch": "100 tokens", "max_length": 512}, "cuda", ("packed", 1, 1, 4096)),
        ({"global_batch": 6, "batching": "packed"}, "cpu", ("packed", 6, 3, 4096)),
        ({"global_batch": 6, "batching": "bucketed", "micro_batch": 2}, "cpu", ("bucketed", 6, 2, None)),
        ({"global_batch": 6, "micro_batch": "600 tokens", "max_length": 200}, "cpu", ("random", 6, 3, 600)),
        ({"global_batch": 6, "micro_batch": "100 tokens", "max_length": 200}, "cpu", ("random", 6, 1, 100)),
    ],
)
def test_batching(asked: dict, device: Literal["cpu", "cuda"], expected: tuple) -> None:
    stage = _plan(device=device, **asked).stages[0]
    assert (stage.kind, stage.units_per_step, stage.micro_batch, stage.budget_tokens) == expected


def test_an_epoch_of_packs() -> None:
    stage = _plan(global_batch=4, batching="packed", epochs=1).stages[0]
    assert (stage.num_units, stage.num_steps, stage.unit) == (30, 8, "packs")
    guess = replace(TRAIN, is_whole=False, num_packs=0)
    assert _plan(global_batch=4, batching="packed", train=guess).stages[0].num_units == math.ceil(5000 / 512)


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match=r"stages\.a\.data\.train has no samples"):
        _plan(train=replace(TRAIN, num_samples=0))


def test_a_ds_config_wins_over_a_default_and_contradicts_a_wish() -> None:
    fixed = AUTO | {"train_batch_size": 64}
    assert _plan(ds=fixed).stages[0].units_per_step == 64
    with pytest.raises(DsConfigError, match=r"64.*32|32.*64"):
        _plan(ds=fixed, global_batch=32)
    rate = AUTO | {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}
    assert _plan(ds=rate).stages[0].schedule.learning_rate == 3e-4
    with pytest.raises(DsConfigError, match="learning_rate"):
        _plan(ds=rate, learning_rate=1e-5)


def test_auto_takes_the_half_that_the_gpus_have() -> None:
    off = AUTO | {"fp16": {"enabled": False}}
    assert _plan(device="cuda").dtype == "bf16"
    assert _plan(device="cuda", half="fp16").dtype == "fp16"
    assert _plan(device="cuda", half="fp16").stages[0].ds["fp16"]["enabled"] is True
    assert _plan(ds=off, device="cuda", half="fp16").dtype == "fp32"
    assert _plan(half="fp16").dtype == "fp32"
    assert _plan(ds=AUTO | {"bf16": {"enabled": True}}, device="cuda", half="fp16").dtype == "bf16"


def test_no_auto_is_left() -> None:
    assert "auto" not in repr(_plan(model=ModelFacts(hidden_size=64)).stages[0].ds)


def test_more_tokens_than_positions() -> None:
    with pytest.raises(ModelError, match="512"):
        _plan(max_length=1024, model=ModelFacts(max_positions=512))
    assert _plan(model=ModelFacts(max_positions=128)).stages[0].max_length == 128


@pytest.mark.parametrize(
    ("task", "num_samples", "steps", "warmup"),
    [
        ("text-classification", 300, 200, 20),
        ("text-classification", 20, 20, 2),
        ("text-classification", 6400, 200, 0),
        ("causal-lm", 300, 30, 3),
    ],
)
def test_few_samples_are_seen_often(task: str, num_samples: int, steps: int, warmup: int) -> None:
    train = replace(TRAIN, num_samples=num_samples, about_rows=num_samples)
    stage = _plan(train=train, global_batch=32, task=task).stages[0]
    assert (stage.num_steps, stage.schedule.warmup_steps) == (steps, warmup)


LONG = {"train_batch_size": "auto", "zero_optimization": {"stage": 3}, "sequence_parallel_size": "auto"}
HEADS = ModelFacts(num_heads=12, num_kv_heads=4)


@pytest.mark.parametrize(
    ("num_workers", "max_length", "team"),
    [
        (8, 16_384, 1),
        (8, 16_385, 2),
        (8, 60_000, 4),
        (8, 1_000_000, 4),  # 8 does not divide 12 heads.
        (6, 40_000, 2),  # 3 and 6 do not go with 4 heads of keys and values.
        (1, 1_000_000, 1),
        (7, 1_000_000, 1),
    ],
)
def test_auto_lets_as_few_workers_share_a_sample_as_it_takes(
    num_workers: int, max_length: int, team: int
) -> None:
    stage = _plan(num_workers, LONG, HEADS, max_length=max_length, global_batch=24).stages[0]
    assert stage.team == team == stage.ds["sequence_parallel_size"]
    assert stage.share_length == math.ceil(max_length / team)
    assert stage.num_teams * team == num_workers
    assert stage.ds["train_batch_size"] == stage.micro_batch * stage.accumulation * stage.num_teams >= 24


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        (ModelFacts(), {}),
        (HEADS, {"task": "text-classification"}),
        (HEADS, {"generation": {"exact_match": True}}),
    ],
)
def test_auto_divides_no_sample_that_cannot_be(model: ModelFacts, stage: dict) -> None:
    assert _plan(8, LONG, model, max_length=100_000, **stage).stages[0].team == 1


@pytest.mark.parametrize(
    ("num_workers", "team", "stage", "says"),
    [
        (3, 2, {}, "there are 3 workers, which 2 does not divide"),
        (10, 5, {}, "the model has 12 attention heads, which 5 does not divide"),
        (6, 6, {}, "the model has 4 heads of keys and values, which do not divide among 6 workers"),
        (2, 2, {"task": "text-classification"}, "stages.a.task is text-classification, and only samples of"),
        (2, 2, {"generation": {"exact_match": True}}, "stages.a.generation.exact_match is true"),
    ],
)
def test_samples_that_cannot_be_divided_are_refused(
    num_workers: int, team: int, stage: dict, says: str
) -> None:
    with pytest.raises(DsConfigError) as refused:
        _plan(num_workers, LONG | {"sequence_parallel_size": team}, HEADS, **stage)
    said = str(refused.value)
    assert said.startswith(f"ds.json: sequence_parallel_size is {team}, but {says}")
    assert said.endswith(": write 1, or leave it out") and "\n" not in said


def test_the_global_batch_is_the_same_whoever_shares_samples() -> None:
    for team, accumulation in ((1, 3), (2, 6), (4, 12)):
        ds = LONG | {"sequence_parallel_size": team}
        stage = _plan(4, ds, HEADS, global_batch=24, micro_batch=2).stages[0]
        assert (stage.units_per_step, stage.accumulation) == (24, accumulation)
    fixed = LONG | {
        "sequence_parallel_size": 2,
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
    }
    with pytest.raises(DsConfigError, match=r"4 workers / 2 that share samples = 12"):
        _plan(4, fixed, HEADS)


def test_networks_run_in_tiles_where_little_else_is_held() -> None:
    long = {"max_length": 40_000, "micro_batch": 1}
    assert _plan(**long, activation_checkpointing=True).stages[0].mlp_tile == 8192
    assert _plan(**long).stages[0].mlp_tile is None
    assert _plan(max_length=4_000, micro_batch=1, activation_checkpointing=True).stages[0].mlp_tile is None
    shared = _plan(2, LONG, HEADS, **long, activation_checkpointing=True).stages[0]
    assert (shared.share_length, shared.mlp_tile) == (20_000, None)
