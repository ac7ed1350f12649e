"""The work that all contenders do: a small Llama on chats, tokenised once, by the launcher."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 8192
GLOBAL_BATCH, MICRO_BATCH, MAX_LENGTH, LEARNING_RATE = 16, 8, 512, 3e-4


@dataclass(frozen=True, slots=True)
class Work:
    """Where everything is, for processes of their own.

    Attributes:
        model: of the transformers config.
        samples: a file of `ids`, `labels` and `bounds` (numpy): sample i has those from bounds[i] to bounds[i + 1].
        recipe: the launcher's.
    """

    folder: str
    model: dict[str, Any]
    samples: str
    recipe: str
    pad_token_id: int

    def save(self) -> Path:
        """Write it down; return the file."""
        path = Path(self.folder) / "work.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def load(path: str) -> Work:
    """Read what `save` wrote."""
    return Work(**json.loads(Path(path).read_text()))


def make(
    folder: Path, data: Path | None, batching: str = "bucketed", layers: int = 4, hidden: int = 256
) -> Work:
    """Tokenise the chats with a tokenizer of their own and write down recipe, model and samples.

    Args:
        folder: to write to.
        data: a JSONL file of chats; None: made-up ones with lengths like GSM8K's.
        batching: of the recipe.
        layers, hidden: of the model.
    """
    import yaml

    from tests.conftest import chat_rows, make_tokenizer, write_jsonl

    file = data or write_jsonl(folder / "chats.jsonl", chat_rows(4000))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = make_tokenizer(folder / "tokenizer", texts, VOCABULARY)
    model = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    stage = {
        "name": "chat",
        "task": "causal-lm",
        "data": {"train": str(file.resolve())},
        "steps": 10_000,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "batching": batching,
    }
    tree = {
        "model": {"config": model, "tokenizer": str(tokenizer), "dtype": "fp32"},
        "checkpoint": {"every_steps": 100_000},
        "spares": False,
        "stages": [stage],
    }
    recipe = folder / f"{batching}.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    samples, pad = _samples(tree, folder)
    return Work(str(folder), model, str(samples), str(recipe), pad)


def _samples(tree: dict[str, Any], folder: Path) -> tuple[Path, int]:
    """Tokenise as the launcher does; write all samples in the order of the file."""
    from transformers import AutoTokenizer

    from launcher import recipe as recipes
    from launcher.data.split import Split
    from launcher.data.store import Store
    from launcher.facts import prepare_all
    from launcher.plan.plan import ModelFacts

    recipe = recipes.parse(tree)
    hidden = tree["model"]["config"]["hidden_size"]
    facts = ModelFacts(hidden_size=hidden, max_positions=MAX_LENGTH)
    prepared = prepare_all(recipes.dump(recipe), facts, str(folder / "store"))
    split = Split([Store(Path(path)) for path in prepared.facts[0].train.stores])
    ragged = split.ragged(split.all_samples())
    ids = [each.astype(np.int64) for each in ragged["input_ids"]]
    masks = ragged.get("target_mask") or [np.ones(len(each), dtype=np.int64) for each in ids]
    labels = [np.where(mask.astype(bool), each, -100) for each, mask in zip(ids, masks, strict=True)]
    bounds = np.cumsum([0, *(len(each) for each in ids)])
    path = folder / "samples.npz"
    np.savez(path, ids=np.concatenate(ids), labels=np.concatenate(labels), bounds=bounds)
    return path, int(AutoTokenizer.from_pretrained(tree["model"]["tokenizer"]).pad_token_id)


def ds_config(stage: int) -> dict[str, Any]:
    """The DeepSpeed config of all contenders: the launcher's own for the stage, with its numbers filled in."""
    zero = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())["zero_optimization"]
    zero = {key: value for key, value in zero.items() if value != "auto"}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero | {"reduce_bucket_size": 50_000_000},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True},
        },
    }


def pad(ids: list[np.ndarray], fill: int, length: int | None = None) -> np.ndarray:
    """Sequences as rows of one array, as long as the longest, or as is said."""
    longest = length or max(len(each) for each in ids)
    rows = np.full((len(ids), longest), fill, dtype=np.int64)
    for row, each in zip(rows, ids, strict=True):
        row[: len(each)] = each
    return rows
