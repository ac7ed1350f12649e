"""What the memory benchmark measures: small models of three shapes, as recipes on made-up texts."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

NUM_RANKS = 2
LENGTH, ROWS = 128, 4
MOST_STEPS = 5
SIZES = {"small": (128, 2), "medium": (256, 4), "large": (512, 6)}
DS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
VOCABULARY = 4000


def model_config(arch: str, size: str) -> dict[str, Any]:
    """Return the config of a small model."""
    hidden, layers = SIZES[size]
    heads = hidden // 64
    stack = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    if arch == "llama":
        shape = {
            "num_key_value_heads": heads,
            "intermediate_size": hidden * 8 // 3,
            "tie_word_embeddings": False,
        }
        return {"model_type": "llama", **stack, **shape}
    if arch == "bert":
        return {"model_type": "bert", **stack, "intermediate_size": hidden * 4}
    return {
        "model_type": "t5",
        "d_model": hidden,
        "d_kv": 64,
        "d_ff": hidden * 2,
        "num_layers": layers // 2,
        "num_decoder_layers": layers // 2,
        "num_heads": heads,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }


TASKS = {"llama": "causal-lm", "bert": "text-classification", "t5": "translation"}


def recipe_of(arch: str, size: str, folder: Path, **stage: Any) -> dict[str, Any]:
    """Return a recipe whose every sample fills `LENGTH`."""
    return {
        "model": {
            "config": model_config(arch, size),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": stage.pop("dtype", "fp32"),
        },
        "stages": [
            {
                "name": "only",
                "task": TASKS[arch],
                "data": {"train": str(folder / f"{arch}.jsonl")},
                "steps": MOST_STEPS,
                "global_batch": ROWS * NUM_RANKS,
                "micro_batch": ROWS,
                "max_length": LENGTH,
                **stage,
            }
        ],
    }


def make_data(folder: Path) -> None:
    """Write texts longer than `LENGTH`, and a tokenizer."""
    from tests.conftest import make_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(VOCABULARY)]
    texts = [" ".join(draw.choices(words, k=LENGTH * 2)) for _ in range(64)]
    make_tokenizer(folder / "tokenizer", texts, VOCABULARY)
    rows = {
        "llama": [{"text": text} for text in texts],
        "bert": [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)],
        "t5": [{"source": text, "target": text} for text in texts],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def cases() -> list[dict[str, Any]]:
    """Return what is measured."""
    found = []
    for arch, size, ds in itertools.product(TASKS, SIZES, DS):
        for recomputes in (False, True):
            stage: dict[str, Any] = {"activation_checkpointing": recomputes}
            name = f"{arch}-{size}-{ds}" + ("-recompute" if recomputes else "")
            found.append({"name": name, "arch": arch, "size": size, "ds": ds, "stage": stage})
    for arch, ds in itertools.product(("llama", "bert"), ("zero1", "zero3")):
        lora = {"trainable": {"lora": {"rank": 8}}}
        found.append(
            {"name": f"{arch}-large-{ds}-lora", "arch": arch, "size": "large", "ds": ds, "stage": lora}
        )
    for arch, ds in itertools.product(("llama",), ("zero1", "zero2", "zero3", "zero3_offload")):
        found.append(
            {
                "name": f"{arch}-large-{ds}-bf16",
                "arch": arch,
                "size": "large",
                "ds": ds,
                "stage": {"dtype": "bf16"},
            }
        )
    return found
