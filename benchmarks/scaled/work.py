"""What the ranks train: a small Llama on texts that fill every sample."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTH, VOCABULARY, HIDDEN, LAYERS = 128, 4000, 256, 4
TASK = "causal-lm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe with its data prepared, and a ds config.

    Attributes:
        tree: the recipe.
        ds: the ds config.
        folder: for what a run would write.
    """

    name: str
    tree: dict[str, Any]
    ds: dict[str, Any]
    facts: Any
    prepared: Any
    folder: str

    def context(self, rank: int, world: int) -> Any:
        """Return what a worker would hold."""
        from tests.train import transfer_ranks

        folder = Path(self.folder) / self.name
        return transfer_ranks.context(
            self.tree, self.name, self.ds, self.facts, self.prepared, folder, rank, world
        )

    def shapes(self, world: int) -> tuple[Any, Any, Any]:
        """Return the stage's plan, its shapes and its settings."""
        from launcher import footprint
        from launcher import recipe as recipes
        from launcher.plan import ds_memory

        plan = self.context(0, world).plan
        stage = plan.stages[0]
        shapes = footprint.of_stage(
            recipes.parse(self.tree), stage, self.prepared.facts, dtype=plan.dtype, device="cpu"
        )
        return stage, shapes, ds_memory.sharding(stage.ds, plan.dtype)


def make_data(folder: Path) -> None:
    """Write texts longer than `LENGTH`, and a tokenizer."""
    from tests.conftest import make_tokenizer, write_jsonl

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(VOCABULARY)]
    texts = [" ".join(draw.choices(words, k=LENGTH * 2)) for _ in range(256)]
    make_tokenizer(folder / "tokenizer", texts, VOCABULARY)
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])


def job(
    folder: Path,
    name: str,
    ds: str,
    *,
    rows: int,
    global_rows: int,
    zero: dict[str, Any] | None = None,
    **stage: Any,
) -> Job:
    """Prepare a job.

    Args:
        folder: of `make_data`.
        name: of the job.
        ds: of the ds config in `ds_configs`.
        rows: samples of a micro-batch.
        global_rows: samples of a step, over all workers.
        zero: what to change in the ds config's ZeRO section.
        stage: what to change in the recipe's stage.
    """
    from launcher import recipe as recipes
    from launcher.facts import prepare_all
    from launcher.plan import zero as ds_configs
    from launcher.plan.plan import ModelFacts

    model = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": HIDDEN // 64,
        "intermediate_size": HIDDEN * 8 // 3,
        "tie_word_embeddings": False,
    }
    tree = {
        "model": {"config": model, "tokenizer": str(folder / "tokenizer"), "dtype": "fp32"},
        "stages": [
            {
                "name": "only",
                "task": TASK,
                "data": {"train": str(folder / "texts.jsonl")},
                "steps": 10_000,
                "global_batch": global_rows,
                "micro_batch": rows,
                "max_length": LENGTH,
                **stage,
            }
        ],
    }
    config = ds_configs.load(str(ROOT / "ds_configs" / f"{ds}.json"))
    config["zero_optimization"] = config["zero_optimization"] | (zero or {})
    dumped, facts = recipes.dump(recipes.parse(tree)), ModelFacts(hidden_size=HIDDEN)
    prepared = prepare_all(dumped, facts, str(folder / "store"))
    return Job(name=name, tree=dumped, ds=config, facts=facts, prepared=prepared, folder=str(folder / "runs"))
