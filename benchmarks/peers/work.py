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
GLOBAL_BATCH, MAX_LENGTH, LEARNING_RATE = 16, 512, 3e-4
GPU_TOKENS = 16_384
"""Of a rank's step, padding included."""
DTYPES = {"gpu": "bf16", "cpu": "fp32"}
RAGGED, SCALARS = "ragged", "scalars"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    # As Qwen2.5-0.5B, TinyLlama and Qwen2.5-1.5B have it: for GPUs.
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}
"""Llamas, over `LLAMA`."""
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 768,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 8,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the works.

    Attributes:
        task: of the recipe's stage; `auto_model`: the class of transformers for it.
        config: of a model made at random; None: a pretrained one is named.
        stage: what its recipe says besides.
    """

    task: str
    auto_model: str
    config: dict[str, Any] | None
    stage: dict[str, Any]


KINDS = {
    "chats": Kind("causal-lm", "AutoModelForCausalLM", LLAMA, {"max_length": MAX_LENGTH}),
    "sentences": Kind(
        "text-classification",
        "AutoModelForSequenceClassification",
        None,
        {"max_length": 128, "global_batch": 64},
    ),
    "translation": Kind("translation", "AutoModelForSeq2SeqLM", T5, {"max_length": 128, "global_batch": 64}),
}


@dataclass(frozen=True, slots=True)
class Work:
    """Where everything is, for processes of their own.

    Attributes:
        kind: of KINDS.
        start: the directory of the model that training starts with.
        samples: a file (numpy) of the samples, as `samples_of` reads it.
        recipe: the launcher's.
        micro_batch: samples of a rank's step.
        max_length: tokens of a sample at most.
        device: gpu or cpu.
    """

    folder: str
    kind: str
    start: str
    samples: str
    recipe: str
    pad_token_id: int
    micro_batch: int
    max_length: int
    device: str

    @property
    def dtype(self) -> str:
        """Of the weights in training."""
        return DTYPES[self.device]

    def save(self) -> Path:
        """Write it down; return the file."""
        path = Path(self.folder) / "work.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def load(path: str) -> Work:
    """Read what `save` wrote."""
    return Work(**json.loads(Path(path).read_text()))


def make(
    folder: Path,
    kind: str,
    data: Path | None,
    *,
    batching: str = "bucketed",
    model: Path | None = None,
    compile: bool = False,
    size: str = "small",
    max_length: int | None = None,
    workers: int = 2,
    device: str = "cpu",
) -> Work:
    """Tokenise the data and write down recipe, model and samples.

    A worker of the launcher has the memory of the peers' fullest batch: micro_batch samples of max_length tokens.

    Args:
        folder: to write to.
        kind: of KINDS.
        data: a JSONL file of chats, None: made-up ones with lengths like GSM8K's, where max_length is longer with several
            turns; or a Parquet file of the task's columns.
        batching, compile: of the recipe.
        model: a pretrained one, for a kind without a config.
        size: of the Llama, of SIZES.
        max_length: instead of the kind's.
        workers: that share a step's samples.
        device: gpu (in bf16) or cpu (in fp32).
    """
    import yaml

    known = KINDS[kind]
    length = max_length or known.stage["max_length"]
    config = known.config if kind != "chats" else LLAMA | SIZES[size] | {"max_position_embeddings": length}
    file, tokenizer = _data(folder, known, data, length)
    stage = {
        "name": "it",
        "task": known.task,
        "data": {"train": str(file.resolve())},
        "steps": 10_000,
        "global_batch": GLOBAL_BATCH,
        "learning_rate": LEARNING_RATE,
        "batching": batching,
        **known.stage,
        "max_length": length,
    }
    if device == "gpu":
        stage["global_batch"] = workers * max(1, GPU_TOKENS // length)
    per_rank = stage["global_batch"] // workers
    stage["micro_batch"] = per_rank if batching == "packed" else f"{per_rank * length} tokens"
    origin = {"path": str(model)} if config is None else {"config": config, "tokenizer": str(tokenizer)}
    tree = {
        "model": {**origin, "dtype": DTYPES[device], "compile": compile},
        "checkpoint": {"every_steps": 100_000},
        "spares": False,
        "stages": [stage],
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    samples, start, pad = _samples(recipe, folder)
    return Work(str(folder), kind, start, str(samples), str(recipe), pad, per_rank, length, device)


def _data(folder: Path, kind: Kind, data: Path | None, length: int) -> tuple[Path, Path | None]:
    """Return the file of rows, and a tokenizer of their own where the model has none."""
    from tests.conftest import chat_rows, make_tokenizer, write_jsonl

    if kind.task == "causal-lm":
        file = data or write_jsonl(folder / "chats.jsonl", _joined(chat_rows(4000), length // MAX_LENGTH))
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        texts = [message["content"] for row in rows for message in row["messages"]]
        return file, make_tokenizer(folder / "tokenizer", texts, VOCABULARY)
    if data is None:
        raise SystemExit("--data: name a Parquet file")
    if kind.config is None:
        return data, None
    import pyarrow.parquet as pq

    table = pq.read_table(data)
    texts = [text for column in ("source", "target") for text in table[column].to_pylist()]
    return data, make_tokenizer(folder / "tokenizer", texts, VOCABULARY)


def _joined(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Chats one after another in one, as many as 1 to `most`."""
    if most <= 1:
        return rows
    counts = np.random.default_rng(0).integers(1, most + 1, len(rows))
    ends = np.cumsum(counts)
    return [
        {"messages": [message for row in rows[end - count : end] for message in row["messages"]]}
        for count, end in zip(counts, ends, strict=True)
        if end <= len(rows)
    ]


def prepared_of(recipe_file: str, folder: str) -> tuple[Any, Any, Any]:
    """Return the launcher's recipe, the facts of its model, and its prepared data."""
    import yaml

    from launcher import recipe as recipes
    from launcher.facts import prepare_all
    from launcher.plan import sizes

    recipe = recipes.parse(yaml.safe_load(Path(recipe_file).read_text(encoding="utf-8")))
    facts = sizes.model_facts(recipe.model)
    return recipe, facts, prepare_all(recipes.dump(recipe), facts, f"{folder}/store")


def _samples(recipe_file: Path, folder: Path) -> tuple[Path, str, int]:
    """Tokenise as the launcher does; write all samples in the order of the file. Return also the model and padding."""
    from launcher.data.split import Split
    from launcher.data.store import Store
    from launcher.tasks import base
    from launcher.train import model as models

    recipe, _, prepared = prepared_of(str(recipe_file), str(folder))
    split = Split([Store(Path(path)) for path in prepared.facts[0].train.stores])
    every = split.all_samples()
    found: dict[str, Any] = {f"{SCALARS}.{name}": values for name, values in split.scalars(every).items()}
    ragged = split.ragged(every)
    if "target_mask" in ragged:
        masks = ragged.pop("target_mask")
        ragged["labels"] = [
            np.where(mask.astype(bool), ids.astype(np.int64), -100)
            for mask, ids in zip(masks, ragged["input_ids"], strict=True)
        ]
    for name, sequences in ragged.items():
        found[f"{RAGGED}.{name}"] = np.concatenate(sequences).astype(np.int64)
        found[f"bounds.{name}"] = np.cumsum([0, *(len(each) for each in sequences)])
    path = folder / "samples.npz"
    np.savez(path, **found)
    return path, str(prepared.model_directory), base.padding_id(models.load_tokenizer(recipe.model))


def samples_of(work: Work) -> list[dict[str, Any]]:
    """Return the samples: by feature an array of its tokens, or a number."""
    file = np.load(work.samples)
    ragged = {name.split(".")[1]: file[name] for name in file.files if name.startswith(RAGGED)}
    bounds = {name: file[f"bounds.{name}"] for name in ragged}
    scalars = {name.split(".")[1]: file[name] for name in file.files if name.startswith(SCALARS)}
    count = len(bounds["input_ids"]) - 1
    return [
        {name: values[bounds[name][i] : bounds[name][i + 1]] for name, values in ragged.items()}
        | {name: int(values[i]) for name, values in scalars.items()}
        for i in range(count)
    ]


def ds_config(stage: int, work: Work) -> dict[str, Any]:
    """The DeepSpeed config of all contenders: the launcher's own for the stage, with its numbers filled in."""
    zero = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())["zero_optimization"]
    zero = {key: value for key, value in zero.items() if value != "auto"}
    adam = {"lr": LEARNING_RATE, "weight_decay": 0.0} | ({"torch_adam": True} if work.device == "cpu" else {})
    return {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero | {"reduce_bucket_size": 50_000_000},
        "bf16": {"enabled": work.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": adam},
    }


def pad(ids: list[np.ndarray], fill: int, length: int | None = None) -> np.ndarray:
    """Sequences as rows of one array, as long as the longest, or as is said."""
    longest = length or max(len(each) for each in ids)
    rows = np.full((len(ids), longest), fill, dtype=np.int64)
    for row, each in zip(rows, ids, strict=True):
        row[: len(each)] = each
    return rows
