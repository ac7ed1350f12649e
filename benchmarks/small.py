"""The small chat run that several benchmarks make: a Llama of a million parameters, data that come with it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import chat_rows, make_tokenizer, write_jsonl  # noqa: E402
from tests.runs import chat_recipe  # noqa: E402

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}


def recipe(folder: Path, steps: int) -> Path:
    """Write data, tokenizer and recipe of so many steps of 4 samples; return the recipe's file."""
    rows = chat_rows(200)
    texts = [message["content"] for row in rows for message in row["messages"]]
    setup = {
        "config": MODEL,
        "tokenizer": make_tokenizer(folder / "tokenizer", texts),
        "train": write_jsonl(folder / "train.jsonl", rows),
    }
    return chat_recipe(setup, folder / "chat.yaml", steps=steps, global_batch=4, micro_batch=2)
