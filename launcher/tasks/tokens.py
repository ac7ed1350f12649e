"""Texts to flat arrays of token ids, by the Rust tokenizer itself, with no Python step for each token; and back."""

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.tasks.base import Features, Ragged

_UINT16_IDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Encoded texts, cut to a length.

    Attributes:
        ragged: `input_ids`, and `token_type_ids` if the model takes them.
        lost: int64 (texts,): the tokens that each lost.
    """

    ragged: dict[str, Ragged]
    lost: np.ndarray


def settle(tokenizer: Any) -> None:
    """Set the Rust tokenizer as transformers does before each call; the functions here do not."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens


def encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> Ragged:
    """Return the ids of texts: uint16 if every id of the tokenizer fits, else int32."""
    # Without offsets it takes a fifth less time.
    backend = tokenizer.backend_tokenizer
    return ids_of(tokenizer, backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens))


def encode_spans(
    tokenizer: Any, texts: list[str], edges: Sequence[Sequence[int]], *, add_special_tokens: bool
) -> tuple[Ragged, np.ndarray]:
    """Return the ids of texts, as `encode`, and which tokens lie in spans of their characters.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        edges: for each, the characters where spans begin and end, in turn and in order.
        add_special_tokens: whether to add those of the tokenizer.

    Returns:
        The ids, and a uint8 for each: 1 if the token's first character lies inside a span.
    """
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
    ids, lengths = ids_of(tokenizer, encodings)
    firsts = (np.cumsum(lengths) - lengths).tolist()
    places = [
        first + first_token(encoding, edge)
        for encoding, first, own in zip(encodings, firsts, edges, strict=True)
        for edge in own
    ]
    steps = np.zeros(len(ids) + 1, dtype=np.int8)
    # Where one span ends the next may begin: they must add up, not overwrite.
    np.add.at(steps, np.array(places[0::2], dtype=np.int64), 1)
    np.add.at(steps, np.array(places[1::2], dtype=np.int64), -1)
    return (ids, lengths), np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)


def encode_cut(tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int) -> Cut:
    """Encode texts, or pairs of texts, with special tokens; the longest lose tokens, never special ones."""
    backend = tokenizer.backend_tokenizer
    inputs: list[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
    backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    try:
        encodings = backend.encode_batch_fast(inputs)
    finally:
        # What stays switched on would be exported with the tokenizer.
        backend.no_truncation()
    ids, lengths = ids_of(tokenizer, encodings)
    ragged = {"input_ids": (ids, lengths)}
    if "token_type_ids" in tokenizer.model_input_names:
        types = array("B")
        for encoding in encodings:
            types.fromlist(encoding.type_ids)
        ragged["token_type_ids"] = (np.array(types), lengths)
    lost = np.zeros(len(encodings), dtype=np.int64)
    cut = [i for i in np.flatnonzero(lengths >= max_length).tolist() if encodings[i].overflowing]
    if pairs is None:
        special = backend.num_special_tokens_to_add(False)
        lost[cut] = [sum(len(part) - special for part in encodings[i].overflowing) for i in cut]
    else:
        # The overflow of a pair repeats tokens, so it cannot tell how many there are.
        lost[cut] = _lengths(backend.encode_batch_fast([inputs[i] for i in cut])) - lengths[cut]
    return Cut(ragged, lost)


def rectangle(values: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Return sequences that lie one after another as an int64 rectangle, at least one wide."""
    inside = np.arange(max(1, int(lengths.max(initial=0)))) < lengths[:, None]
    padded = np.full((*inside.shape, *values.shape[1:]), fill, dtype=np.int64)
    padded[inside] = values
    return padded


def first_token(encoding: Any, character: int) -> int:
    """Return the first token that begins at `character` or later; the number of tokens if none does."""
    at = encoding.char_to_token(character)
    count = len(encoding)
    if at is None:  # a character that the tokenizer leaves out, or the end of the text
        if not count or encoding.token_to_chars(count - 1)[0] < character:
            return count
        return bisect_left(range(count), character, key=lambda t: encoding.token_to_chars(t)[0])
    # Before it there may be tokens without a character; itself may begin further left, as may more
    # that share its character (the bytes of an emoji).
    while at > 0 and encoding.token_to_chars(at - 1)[0] >= character:
        at -= 1
    while at < count and encoding.token_to_chars(at)[0] < character:
        at += 1
    return at


def with_end(ragged: Ragged, end: int) -> Ragged:
    """Return the sequences, each closed by the id `end` if it is not yet."""
    values, lengths = ragged
    ends = np.cumsum(lengths)
    is_open = np.ones(len(lengths), dtype=bool)
    is_open[lengths > 0] = values[ends[lengths > 0] - 1] != end
    return np.insert(values, ends[is_open], end), lengths + is_open


def heads(lengths: np.ndarray, size: int) -> np.ndarray:
    """Return a bool for each token of all sequences: whether it is among the first `size` of its own."""
    firsts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(firsts, lengths) < size


def windows(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences into consecutive windows of at most `size`, all but the last two of just that.

    Returns:
        The length of each window, and the sequence it is from.
    """
    counts = -(-lengths // size)
    owners = np.repeat(np.arange(len(lengths)), counts)
    cut = np.full(len(owners), size, dtype=np.int64)
    last = (np.cumsum(counts) - 1)[counts > 0]
    cut[last] = (lengths - (counts - 1) * size)[counts > 0]
    # A window of one token has nothing to predict: it takes one more from the window before.
    lonely = last[(cut[last] == 1) & (counts[counts > 0] > 1)] if size > 2 else last[:0]
    cut[lonely] += 1
    cut[lonely - 1] -= 1
    return cut, owners


def ids_of(tokenizer: Any, encodings: list[Any]) -> Ragged:
    """Return the ids of encodings: uint16 if every id of the tokenizer fits, else int32."""
    flat = array("H" if len(tokenizer) <= _UINT16_IDS else "i")
    # `fromlist` is the quickest way out of the lists that the Rust side makes: 3 % of the encoding itself.
    for encoding in encodings:
        flat.fromlist(encoding.ids)
    return np.array(flat), _lengths(encodings)


def samples(ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, size: int, is_split: bool) -> Features:
    """Make samples of at most `size` tokens; those without a target are left out.

    Args:
        ids: of all rows, one after another.
        mask: uint8 as long as the ids: 1 where a token bears loss.
        lengths: int64, tokens of each row.
        size: the most tokens of a sample.
        is_split: whether what is longer makes further samples, or is lost.
    """
    lost = np.zeros(len(lengths), dtype=np.int64)
    if is_split:
        lengths, owners = windows(lengths, size)
    else:
        owners, lost = np.arange(len(lengths)), np.maximum(lengths - size, 0)
        if lost.any():
            inside = heads(lengths, size)
            ids, mask, lengths = ids[inside], mask[inside], lengths - lost
    total = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    ends = np.cumsum(lengths)
    # Position 0 has no logits that predict it.
    counts = total[ends] - total[np.minimum(ends - lengths + 1, ends)]
    kept = counts > 0
    num_skipped = len(lost) - len(np.unique(owners[kept]))
    if not kept.all():
        inside = np.repeat(kept, lengths)
        ids, mask, lengths, counts = ids[inside], mask[inside], lengths[kept], counts[kept]
        owners = owners[kept]
    return Features(
        ragged={"input_ids": (ids, lengths), "target_mask": (mask, lengths)},
        scalars={"num_targets": counts.astype(np.int32)},
        num_skipped=num_skipped,
        num_cut=int(np.count_nonzero(lost[owners])),
        num_cut_tokens=int(lost[owners].sum()),
    )


def texts_of(tokenizer: Any, batch: dict[str, Any]) -> list[str]:
    """Return the text of each row of a batch; where special tokens part it, a bar does."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [text_of(tokenizer, [i for i, is_own in zip(*row, strict=True) if is_own]) for row in rows]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of a sequence without its special tokens; a bar stands for those in its middle."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    # What is unknown was a word, unless the tokenizer has one token for everything special.
    unknown = {tokenizer.unk_token_id} - named
    special = set(tokenizer.all_special_ids) - unknown
    pieces = [list(run) for is_special, run in itertools.groupby(ids, special.__contains__) if not is_special]
    return " | ".join(filter(None, (text.strip() for text in tokenizer.batch_decode(pieces))))


def _lengths(encodings: Sequence[Any]) -> np.ndarray:
    return np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
