"""The plan as a table: the global batch is fixed, the world only changes who runs what."""

import math

import pytest

from launcher import recipe as recipes
from launcher.errors import DsConfigError, ModelError
from launcher.plan.plan import ModelFacts, Plan, SplitFacts, StageFacts, World, make_plan

FACTS = (StageFacts(train=SplitFacts(num_rows=100, num_samples=100), eval=None),)
AUTO = {"train_batch_size": "auto", "zero_optimization": {"stage": 3}}


def _plan(
    num_workers: int = 2, ds: dict | None = None, model: ModelFacts | None = None, **stage: object
) -> Plan:
    asked = {"name": "a", "task": "causal-lm", "data": {"train": "x.jsonl"}, **stage}
    recipe = recipes.parse({"model": {"path": "m"}, "stages": [asked]})
    world = World(num_workers=num_workers, device="cpu")
    return make_plan(recipe, ds or AUTO, "ds.json", model or ModelFacts(), FACTS, world)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 64])
def test_every_world_trains_the_same_steps_on_the_same_positions(num_workers: int) -> None:
    stage = _plan(num_workers, global_batch=24, epochs=2).stages[0]
    assert stage.num_steps == math.ceil(200 / 24)
    seen = [p for step in range(1, stage.num_steps + 1) for p in stage.positions(step)]
    assert seen == list(range(200))
    assert stage.chunks_per_step * stage.micro_batch >= 24
    assert stage.ds["train_batch_size"] == stage.micro_batch * stage.accumulation * num_workers


def test_steps_instead_of_epochs() -> None:
    stage = _plan(steps=7, global_batch=16).stages[0]
    assert (stage.num_steps, stage.num_positions) == (7, 112)


def test_a_ds_config_wins_over_a_default_and_contradicts_a_wish() -> None:
    fixed = AUTO | {"train_batch_size": 64}
    assert _plan(ds=fixed).stages[0].samples_per_step == 64
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
