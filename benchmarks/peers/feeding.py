"""The launcher's feed for a rank that is not the launcher's."""

from pathlib import Path
from typing import Any

from peers.work import MAX_LENGTH, ROOT, Work


def feed_of(work: Work, rank: int, num_workers: int) -> Any:
    """Return the feed that a worker of the launcher would have."""
    import yaml

    from launcher import recipe as recipes
    from launcher.data import feed
    from launcher.data.store import Store
    from launcher.facts import prepare_all
    from launcher.plan import zero
    from launcher.plan.plan import ModelFacts, World, make_plan

    recipe = recipes.parse(yaml.safe_load(Path(work.recipe).read_text(encoding="utf-8")))
    facts = ModelFacts(hidden_size=work.model["hidden_size"], max_positions=MAX_LENGTH)
    prepared = prepare_all(recipes.dump(recipe), facts, f"{work.folder}/store")
    config = zero.load(str(ROOT / "ds_configs" / "zero2.json"))
    world = World(num_workers=num_workers, device="cpu")
    plan = make_plan(recipe, config, "zero2", facts, prepared.facts, world).stages[0]
    batching = feed.Batching(
        kind=plan.kind,
        by_tokens=True,
        units_per_step=plan.units_per_step,
        micro_batch=plan.micro_batch,
        budget_tokens=plan.budget_tokens,
    )
    train = prepared.facts[0].train
    return feed.Feed(
        [Store(Path(path)) for path in train.stores],
        list(train.weights),
        batching,
        fingerprint=train.fingerprint,
        seed=recipe.stages[0].seed,
        num_workers=num_workers,
        rank=rank,
        pad_token_id=work.pad_token_id,
    )
