"""How much of a batch is padding, on real text; no training."""

from pathlib import Path
from typing import Any

import pytest

from launcher import recipe as recipes
from launcher.data.feed import Batching, Feed
from launcher.data.store import Store
from launcher.facts import prepare_all
from launcher.plan.plan import ModelFacts, StagePlan, World, make_plan
from tests.conftest import SHARED_DATA, make_tokenizer

pytestmark = [pytest.mark.data]


def _plan(folder: Path, stage: dict[str, Any], texts: list[str]) -> tuple[StagePlan, Feed]:
    """Plan and feed of rank 0 of 2, as a run makes them."""
    tokenizer = make_tokenizer(folder / "tokenizer", texts, 4000)
    config = {"model_type": "llama" if stage["task"] == "causal-lm" else "bert", "hidden_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    recipe = recipes.parse(
        {"model": {"config": config, "tokenizer": str(tokenizer)}, "stages": [{"name": "a", **stage}]}
    )
    prepared = prepare_all(recipes.dump(recipe), ModelFacts(max_positions=1024), str(folder / "store"))
    world = World(num_workers=2, device="cpu")
    plan = make_plan(recipe, {}, "ds", ModelFacts(max_positions=1024), prepared.facts, world).stages[0]
    batching = Batching(
        kind=plan.kind,
        by_tokens=stage["task"] == "causal-lm",
        units_per_step=plan.units_per_step,
        micro_batch=plan.micro_batch,
        budget_tokens=plan.budget_tokens,
    )
    stores = [Store(Path(path)) for path in prepared.facts[0].train.stores]
    feed = Feed(stores, [1.0], batching, fingerprint="f", seed=0, num_workers=2, rank=0, pad_token_id=0)
    return plan, feed


def _padding(plan: StagePlan, feed: Feed) -> float:
    tokens = slots = 0
    for step in range(1, plan.num_steps + 1):
        batch = feed.step(step)
        tokens, slots = tokens + batch.num_tokens, slots + batch.num_slots
    return 1 - tokens / slots


@pytest.mark.parametrize(("batching", "most"), [("packed", 0.03), ("bucketed", 0.06)])
def test_gsm8k_at_1024_tokens(tmp_path: Path, batching: str, most: float) -> None:
    file = SHARED_DATA / "gsm8k" / "train.jsonl"
    if not file.exists():
        pytest.skip("gsm8k is not beside the checkout")
    stage = {"task": "causal-lm", "data": {"train": str(file)}, "max_length": 1024}
    stage |= {"global_batch": "16384 tokens", "batching": batching}
    plan, feed = _plan(tmp_path, stage, file.read_text().splitlines()[:2000])
    assert plan.kind == batching
    padding = _padding(plan, feed)
    print(f"gsm8k at 1,024 tokens, {batching}: {padding:.2%} padding")
    assert padding < most


def test_sst2_with_batches_by_tokens(tmp_path: Path) -> None:
    file = SHARED_DATA / "sst2" / "train.parquet"
    if not file.exists():
        pytest.skip("sst2 is not beside the checkout")
    import pyarrow.parquet as pq

    stage = {"task": "text-classification", "data": {"train": str(file)}, "max_length": 64}
    plan, feed = _plan(tmp_path, stage, pq.read_table(file)["text"].to_pylist())
    assert plan.kind == "bucketed"
    padding = _padding(plan, feed)
    print(f"sst2, batches of 32 of like length: {padding:.2%} padding")
    assert padding < 0.1
