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
    **stage: object,
) -> Plan:
    asked = {"name": "a", "task": "causal-lm", "data": {"train": "x.jsonl"}, **stage}
    recipe = recipes.parse({"model": {"path": "m"}, "stages": [asked]})
    world = World(num_workers=num_workers, device=device)
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
