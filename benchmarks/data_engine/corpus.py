"""The text that is measured: made by rule or read from a file, in the files and rows of each task."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = 8192
LABELS = ("business", "science", "sport", "world")
ROWS_PER_GROUP = 4096
_NUM_WORDS = 60_000
_TRAINED_ON_BYTES = 8_000_000
_ONSETS = "b br c ch cl d f fr g gr h j k l m n p pl pr qu r s sh st str t th tr v w y".split()
_NUCLEI = "a e i o u ai ea ee ie oa ou".split()
_CODAS = ["", "", "", *"b ck d g l ll m n nd ng nt p r rd s ss st t th x".split()]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and conversations where they come from some.

    Attributes:
        texts: about `num_bytes` of text.
        talks: messages of each conversation; made of pairs of texts where the source has none.
        is_made: whether it is made by rule, not read from a file.
    """

    texts: list[str]
    talks: list[list[Row]]
    is_made: bool


def make(num_bytes: int, seed: int = 0) -> Corpus:
    """Make text whose words are as frequent as in English (Zipf), always the same."""
    draw = np.random.default_rng(seed)
    words = np.array(_words(seed))
    chance = 1 / (np.arange(_NUM_WORDS) + 2.7)
    chance /= chance.sum()
    texts: list[str] = []
    size = 0
    while size < num_bytes:
        rows = _documents(draw, words, chance, 2000)
        texts += rows
        size += sum(map(len, rows))
    return Corpus(texts, _pairs(texts), is_made=True)


def read(file: Path, num_bytes: int) -> Corpus:
    """Read JSON lines with `text` or `messages`, over and over until there is enough."""
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    talks = [row["messages"] for row in rows if "messages" in row]
    texts = [row["text"] if "text" in row else _joined(row["messages"]) for row in rows]
    times = -(-num_bytes // max(1, sum(len(text.encode()) for text in texts)))
    return Corpus(texts * times, talks * times or _pairs(texts * times), is_made=False)


def save_tokenizer(corpus: Corpus, folder: Path) -> Path:
    """Train a byte-level BPE tokenizer on the text; save it as the directory of a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    mean_bytes = sum(map(len, corpus.texts)) / len(corpus.texts)
    tokenizer.train_from_iterator(corpus.texts[: round(_TRAINED_ON_BYTES / mean_bytes)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    return folder


def plain_rows(corpus: Corpus) -> Iterator[Row]:
    """Yield one row for each document."""
    return ({"text": text} for text in corpus.texts)


def chat_rows(corpus: Corpus) -> Iterator[Row]:
    """Yield one row for each conversation."""
    return ({"messages": messages} for messages in corpus.talks)


def labelled_rows(corpus: Corpus, seed: int = 0) -> Iterator[Row]:
    """Yield one row for each sentence, with one of four labels."""
    draw = random.Random(seed)
    for text in corpus.texts:
        for sentence in filter(None, text.split("\n")):
            yield {"text": sentence, "label": draw.choice(LABELS)}


def write_jsonl(file: Path, rows: Callable[[], Iterator[Row]], num_bytes: int) -> Path:
    """Write rows as JSON lines, over and over until the file is so large."""
    block = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()
    with open(file, "wb") as sink:
        while (left := num_bytes - sink.tell()) > 0:
            sink.write(block if len(block) <= left else block[: block.rindex(b"\n", 0, left) + 1])
            if len(block) > left:
                break
    return file


def write_parquet(file: Path, rows: Iterator[Row]) -> Path:
    """Write rows as Parquet, in row groups of a few MB."""
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=ROWS_PER_GROUP)
    return file


def size_mb(file: Path) -> float:
    """Return the size of a file."""
    return os.stat(file).st_size / 1e6


def _words(seed: int) -> list[str]:
    draw = random.Random(seed)
    # Frequent words are short, as in any language.
    found: dict[str, None] = {}
    while len(found) < _NUM_WORDS:
        syllables = 1 + int(len(found) > 400) + int(len(found) > 12_000) + int(draw.random() < 0.3)
        parts = [draw.choice(_ONSETS) + draw.choice(_NUCLEI) + draw.choice(_CODAS) for _ in range(syllables)]
        found.setdefault("".join(parts))
    return list(found)


def _documents(draw: np.random.Generator, words: np.ndarray, chance: np.ndarray, count: int) -> list[str]:
    sentences = np.maximum(1, draw.lognormal(1.6, 0.7, count)).astype(int)
    lengths = draw.integers(5, 26, int(sentences.sum()))
    flat = words[draw.choice(len(words), int(lengths.sum()), p=chance)].tolist()
    texts, at = [], 0
    done = iter(lengths.tolist())
    for number in sentences.tolist():
        made = []
        for _ in range(number):
            length = next(done)
            part = flat[at : at + length]
            at += length
            if length > 12:
                part[length // 2] += ","
            if length % 7 == 0:
                part[-1] = str(at % 1999)
            made.append(" ".join(part).capitalize() + ".")
        texts.append("\n".join(made))
    return texts


def _pairs(texts: list[str]) -> list[list[Row]]:
    return [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in zip(texts[0::2], texts[1::2], strict=False)
    ]


def _joined(messages: list[Row]) -> str:
    return "\n\n".join(message["content"] for message in messages)
