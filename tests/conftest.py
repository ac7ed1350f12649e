"""What tests share: small real models, tokenizers and data, made here; no network."""

import json
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
# The compiler's helpers of this environment must be on the path, activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

NOUNS = ["river", "engine", "garden", "teacher", "window", "market", "signal", "bridge", "letter", "castle"]
VERBS = ["holds", "moves", "paints", "follows", "repairs", "counts", "carries", "answers"]


def sentence(draw: random.Random, words: int) -> str:
    """A sentence of about `words` words, for data that only has to be text."""
    return " ".join(draw.choice(NOUNS if i % 2 else VERBS) for i in range(words)) + " ."


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, texts: list[str], vocabulary: int = 400) -> Path:
    """Train a byte-level BPE tokenizer and save it as a directory that AutoTokenizer loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_ranks(rank: int, num_ranks: int, port: int) -> None:
    """Make this process one rank of a world on gloo."""
    import torch

    torch.set_num_threads(1)
    # DeepSpeed wants to find the local rank here, as Ray Train and torchrun put it.
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
    )


def chat_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """Rows of chat data with answers of very different lengths."""
    draw = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(draw, draw.randint(2, 8))},
                {"role": "assistant", "content": sentence(draw, draw.randint(1, 40))},
            ]
        }
        for _ in range(num_rows)
    ]


@pytest.fixture(scope="session")
def chat_setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Chat data, a tokenizer and a small Llama's config, as a recipe wants them."""
    folder = tmp_path_factory.mktemp("chat")
    rows = chat_rows(96)
    real = SHARED_DATA / "gsm8k" / "train.jsonl"
    if real.exists():
        with open(real, encoding="utf-8") as lines:
            rows = [json.loads(next(lines)) for _ in range(96)]
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = make_tokenizer(folder / "tokenizer", texts)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    yield {
        "folder": folder,
        "train": write_jsonl(folder / "train.jsonl", rows),
        "tokenizer": tokenizer,
        "config": config,
    }
