"""Texts to classify: rows, a tiny word tokenizer, a tiny Bert."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from launcher import recipe, tasks
from launcher.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "very"]


@dataclass
class Rows:
    """Some rows of a file."""

    columns: dict[str, list[Any]]

    def where(self, i: int) -> str:
        return f"a.jsonl, row {i + 1}"


def refuse(where, reason):
    raise DataError(f"{where}: {reason}")


def lists(ragged):
    values, lengths = ragged
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def word_tokenizer():
    """A tokenizer with one token for each of WORDS."""
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make(tokenizer=None, max_length=16, **data):
    stage = recipe.Stage(name="s", task="text-classification", data={"train": "x", **data})
    task = tasks.create(stage)
    if tokenizer is not None:
        task.set_tokenizer(tokenizer, max_length)
    return task


def bert(label_type="single", words=("bad", "mixed", "good")):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
        **make(label_type=label_type).model_options(words),
    )
    return BertForSequenceClassification(config).eval()
