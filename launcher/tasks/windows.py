"""Questions and long contexts as overlapping windows of tokens, and answers as places in them."""

import itertools
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.tasks import tokens
from launcher.tasks.base import Ragged, Task, padding_id

LEAST_ROOM = 8
"""Tokens of a context that a window has at least: with fewer there would be a window for each few words."""
_WINDOWS_AT_ONCE = 16
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of some pairs of texts, pair after pair.

    Attributes:
        ragged: `input_ids`, and `token_type_ids` if the model takes them.
        owners: int64 (windows,): the index of each one's pair.
        characters: int64 (tokens, 2): where each token begins and ends in the context; -1 of tokens that
            are not the context's.
        cls: int64 (windows,): the position that stands for "no answer".
    """

    ragged: dict[str, Ragged]
    owners: np.ndarray
    characters: np.ndarray
    cls: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each window."""
        lengths: np.ndarray = self.ragged["input_ids"][1]
        return lengths

    @property
    def positions(self) -> np.ndarray:
        """The position of each token in its window."""
        firsts = np.cumsum(self.lengths) - self.lengths
        places: np.ndarray = np.arange(len(self.characters)) - np.repeat(firsts, self.lengths)
        return places

    def of(self, is_kept: np.ndarray) -> "Windows":
        """Return the windows of the pairs for which `is_kept`, a bool each, holds."""
        windows = is_kept[self.owners]
        kept = np.repeat(windows, self.lengths)
        ragged = {name: (values[kept], lengths[windows]) for name, (values, lengths) in self.ragged.items()}
        return Windows(ragged, self.owners[windows], self.characters[kept], self.cls[windows])


def rooms(tokenizer: Any, questions: list[str], contexts: list[str], max_length: int) -> np.ndarray:
    """Return the context's tokens that fit beside each question; 0 where they are too few for the context."""
    backend = tokenizer.backend_tokenizer
    asked = backend.encode_batch_fast(questions, add_special_tokens=False)
    used = np.fromiter(map(len, asked), dtype=np.int64, count=len(asked))
    room: np.ndarray = max_length - backend.num_special_tokens_to_add(True) - used
    few = np.flatnonzero(room < LEAST_ROOM).tolist()
    whole = backend.encode_batch_fast([(questions[i], contexts[i]) for i in few])
    for i, pair in zip(few, whole, strict=True):
        room[i] = max_length if len(pair) <= max_length else 0
    return room


def cut(
    tokenizer: Any, questions: list[str], contexts: list[str], rooms: np.ndarray, max_length: int, stride: int
) -> Windows:
    """Encode pairs, as many windows each as the context needs.

    Args:
        tokenizer: the tokenizer.
        questions, contexts: the texts; each window has all of the question.
        rooms: as the function `rooms` gives them, none 0.
        max_length: tokens of a window.
        stride: tokens that a window shares with the one before; half the room where it is larger than that.
    """
    backend = tokenizer.backend_tokenizer
    # The Rust side panics at a stride that leaves no way forward.
    strides = np.where(rooms > stride, stride, rooms // 2)
    strides = np.minimum(strides, max(0, max_length - 1))
    found: list[Any] = [None] * len(questions)
    try:
        for step in np.unique(strides).tolist():
            here = np.flatnonzero(strides == step).tolist()
            backend.enable_truncation(max_length, stride=step, strategy="only_second", direction="right")
            encoded = backend.encode_batch([(questions[i], contexts[i]) for i in here])
            for i, encoding in zip(here, encoded, strict=True):
                found[i] = encoding
    finally:
        # What stays switched on would be exported with the tokenizer.
        backend.no_truncation()
    parts = [[encoding, *encoding.overflowing] for encoding in found]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return _as_arrays(tokenizer, list(itertools.chain.from_iterable(parts)), owners)


def _as_arrays(tokenizer: Any, encodings: list[Any], owners: np.ndarray) -> Windows:
    chain = itertools.chain.from_iterable
    ids, lengths = tokens.ids_of(tokenizer, encodings)
    ragged = {"input_ids": (ids, lengths)}
    if "token_type_ids" in tokenizer.model_input_names:
        types = np.fromiter(chain(e.type_ids for e in encodings), dtype=np.uint8, count=len(ids))
        ragged["token_type_ids"] = (types, lengths)
    places = chain(chain(e.offsets for e in encodings))
    characters = np.fromiter(places, dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    # Special tokens are of no text (None), which becomes NaN.
    texts = np.array(list(chain(e.sequence_ids for e in encodings)), dtype=np.float32)
    characters[texts != 1] = -1
    made = Windows(ragged, owners, characters, np.zeros(len(lengths), dtype=np.int64))
    if tokenizer.cls_token_id is not None:
        at = np.flatnonzero(ids == tokenizer.cls_token_id)
        window = np.repeat(np.arange(len(lengths)), lengths)[at]
        # Written backwards, the first one of a window stays.
        made.cls[window[::-1]] = made.positions[at[::-1]]
    return made


def spans(windows: Windows, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find answers in windows.

    Args:
        windows: none of them without a token.
        starts, ends: int64 (pairs,): the characters of each pair's answer in its context; equal where there
            is none.

    Returns:
        int32 (windows, 2): the positions of the answer's first and last token; `cls` twice where the window
        does not hold all of it. And a bool for each pair: whether its answer has a token.
    """
    firsts = np.cumsum(windows.lengths) - windows.lengths
    owner = np.repeat(windows.owners, windows.lengths)
    begin, end = windows.characters[:, 0], windows.characters[:, 1]
    is_answer = (begin >= 0) & (end > starts[owner]) & (begin < ends[owner]) & (starts < ends)[owner]
    if not len(firsts):
        return np.zeros((0, 2), dtype=np.int32), np.zeros(len(starts), dtype=bool)
    low = np.minimum.reduceat(np.where(is_answer, begin, _FAR), firsts)
    high = np.maximum.reduceat(np.where(is_answer, end, -1), firsts)
    # All windows together have every token of the context, so they tell how far the answer reaches.
    lowest, highest = np.full(len(starts), _FAR), np.full(len(starts), -1)
    np.minimum.at(lowest, windows.owners, low)
    np.maximum.at(highest, windows.owners, high)
    is_whole = (high >= 0) & (low == lowest[windows.owners]) & (high == highest[windows.owners])
    place = windows.positions
    first = np.minimum.reduceat(np.where(is_answer, place, _FAR), firsts)
    last = np.maximum.reduceat(np.where(is_answer, place, -1), firsts)
    found = np.stack([np.where(is_whole, first, windows.cls), np.where(is_whole, last, windows.cls)], 1)
    return found.astype(np.int32), highest >= 0


def best_spans(logits: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return of each window the best span's score (-inf: there is none), and the characters (windows, 2)
    of the context at which it begins and ends."""
    outside = (offsets[..., 1] == 0).unsqueeze(-1)
    starts, ends = logits.masked_fill(outside, -math.inf).unbind(-1)
    # (windows, first token, tokens after it)
    ends = F.pad(ends, (0, longest - 1), value=-math.inf).unfold(1, longest, 1)
    scores, at = (starts.unsqueeze(-1) + ends).flatten(1).max(-1)
    first = at // longest
    last = (first + at % longest).clamp(max=logits.shape[1] - 1)
    row = torch.arange(len(at), device=at.device)
    return scores, torch.stack([offsets[row, first, 0], offsets[row, last, 1]], 1) - 1


def outputs(task: Task, model: Any, tokenizer: Any, made: Windows) -> Tensor:
    """Return the logits (windows, length, 2) of all windows, on the CPU."""
    width = max(1, int(made.lengths.max(initial=0)))
    fills = {"input_ids": padding_id(tokenizer)}
    batch = {
        name: torch.from_numpy(tokens.rectangle(values, lengths, fills.get(name, 0)))
        for name, (values, lengths) in made.ragged.items()
    }
    lengths = torch.from_numpy(made.lengths)
    batch["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
    said = []
    for first in range(0, len(lengths), _WINDOWS_AT_ONCE):
        part = {k: v[first : first + _WINDOWS_AT_ONCE].to(model.device) for k, v in batch.items()}
        said.append(task.outputs(model, None, part).float().cpu())
    return torch.cat(said)


def text_between(context: str, start: int, end: int) -> str:
    """Return the text from one character to before another, without space at its edges."""
    # Some tokenizers drop accents that are characters of their own, others count the space before a word.
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return context[start:end].strip()
