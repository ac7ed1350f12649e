"""The plan's model of a step, drawn for clusters that nobody here has: computed, not measured."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.scaled.work import ROOT
from launcher import footprint
from launcher import recipe as recipes
from launcher.plan import cluster as clusters
from launcher.plan import forecast
from launcher.plan import zero as ds_configs
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts, World, make_plan

LENGTH, DTYPE = 4096, "bf16"
STEP_PACKS = 1024
"""Packs of a step in strong scaling: 4 million tokens."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = {"400 Gb/s": "400Gb", "3.2 Tb/s": "3200Gb"}
MODELS = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
WAYS = {
    "ZeRO-2": ("zero2", {}),
    "ZeRO-3": ("zero3", {}),
    "ZeRO-3, large buckets": (
        "zero3",
        {"stage3_prefetch_bucket_size": 500_000_000, "reduce_bucket_size": 500_000_000},
    ),
    "ZeRO-3, hpZ in a node": ("zero3_multinode", {}),
}


def all_points(models: Sequence[str]) -> list[dict[str, Any]]:
    """Return every point of some models: network, way, weak or strong, number of GPUs."""
    found = []
    for model in models:
        shapes = _shapes(model)
        for way, kind, number in itertools.product(WAYS, ("weak", "strong"), GPUS):
            stage = _stage(model, way, kind, number)
            for network, rate in NETWORKS.items():
                about = {"model": model, "way": way, "network": network, "kind": kind, "gpus": number}
                found.append(about | _point(stage, shapes, f"{number // 8}x8xH100,net={rate}"))
    return found


def _point(stage: Any, shapes: Any, nodes: str) -> dict[str, Any]:
    found = forecast.of_stage(stage, shapes, clusters.parse(nodes), DTYPE)
    if found.pace is None:
        raise ValueError(f"no speed is known for {nodes}")
    return {
        "fits": found.fits,
        "device_gib": round(found.device_bytes / (1 << 30), 1),
        "sent_gb": round(found.sent_bytes / 1e9, 2),
        "tokens_per_s": round(found.tokens_per_step / found.pace.step_s),
        "efficiency": round(found.pace.work_s / found.pace.step_s, 4),
        "limit": found.pace.limit,
        **{name: round(value, 4) for name, value in asdict(found.pace).items()},
    }


def _recipe(model: str, packs: int) -> Any:
    config = {
        "model_type": "llama",
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        **MODELS[model],
    }
    stage = {
        "name": "chat",
        "task": "causal-lm",
        "data": {"train": "chats.jsonl"},
        "batching": "packed",
        "steps": 100,
        "global_batch": packs,
        "micro_batch": 1,
        "max_length": LENGTH,
        "activation_checkpointing": True,
    }
    return recipes.parse({"model": {"config": config, "tokenizer": "unused"}, "stages": [stage]})


def _stage(model: str, way: str, kind: str, number: int) -> Any:
    """Return the plan of the stage."""
    recipe = _recipe(model, number if kind == "weak" else STEP_PACKS)
    name, changes = WAYS[way]
    config = ds_configs.load(str(ROOT / "ds_configs" / f"{name}.json"))
    config["zero_optimization"] = config["zero_optimization"] | changes
    split = SplitFacts(
        about_rows=10**6, num_samples=10**6, num_packs=10**6, num_tokens=10**9, is_settled=True
    )
    facts = ModelFacts(hidden_size=MODELS[model]["hidden_size"], max_positions=LENGTH)
    world = World(num_workers=number, device="cuda")
    plan = make_plan(recipe, config, name, facts, (StageFacts(train=split, eval=None),), world)
    return plan.stages[0]


def _shapes(model: str) -> Any:
    split = SplitFacts(about_rows=10**6, num_samples=10**6)
    facts = (StageFacts(train=split, eval=None),)
    stage = _stage(model, "ZeRO-3", "weak", 8)
    return footprint.of_stage(_recipe(model, 8), stage, facts, dtype=DTYPE, device="cuda")
