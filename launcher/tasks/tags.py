"""Tagging schemes: IOB2 and IOBES, what is valid in them, and the entities that a sequence says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launcher.tasks.base import IGNORED

OUTSIDE = "O"


def is_iobes(labels: Sequence[str]) -> bool:
    """Return whether labels belong to IOBES: some say where an entity ends, or that it is one word."""
    return any(label[:2] in ("E-", "S-") for label in labels)


def fault(tag: object) -> str:
    """Return what is wrong with a tag by itself; empty if nothing is."""
    if not isinstance(tag, str):
        return f"is a {type(tag).__name__}, not a tag"
    if tag == OUTSIDE or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2):
        return ""
    return f'"{tag}" is no tag of IOB2 or IOBES (O, B-PER, I-PER, …)'


def parts(label: str) -> tuple[str, str]:
    """Return a label's prefix and its type: B and PER of B-PER."""
    return (label, "") if label == OUTSIDE else (label[0], label[2:])


def may_follow(before: str | None, after: str | None, *, iobes: bool) -> bool:
    """Return whether a label may follow another; None stands for the begin and the end."""
    if before is None:
        return after is None or parts(after)[0] in ("O", "B", "S")
    prefix, kind = parts(before)
    next_prefix, next_kind = (None, None) if after is None else parts(after)
    goes_on = next_prefix in ("I", "E") and next_kind == kind
    if iobes and prefix in ("B", "I"):
        return goes_on
    if iobes or prefix == OUTSIDE:
        return next_prefix not in ("I", "E")
    return goes_on or next_prefix not in ("I", "E")


def allowed(labels: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bool masks: which label may follow which (from, to), come first, come last."""
    iobes = is_iobes(labels)
    pairs = [[may_follow(a, b, iobes=iobes) for b in labels] for a in labels]
    first = [may_follow(None, b, iobes=iobes) for b in labels]
    last = [may_follow(a, None, iobes=iobes) for a in labels]
    return torch.tensor(pairs), torch.tensor(first), torch.tensor(last)


def first_break(tags: Sequence[str], *, iobes: bool) -> int | None:
    """Return the first word whose tag cannot stand after the one before it; None if all can.

    A sequence that ends inside an entity breaks at its last word.

    Args:
        tags: of a sentence.
        iobes: whether the scheme is IOBES, or else IOB2.
    """
    for i, (before, after) in enumerate(zip([None, *tags], [*tags, None], strict=True)):
        if not may_follow(before, after, iobes=iobes):
            return min(i, len(tags) - 1)
    return None


def entities(sequence: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the type, the first and the last word of each entity that tags say, as seqeval finds them."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, first, last) for kind, first, last in get_entities(list(sequence))]


def count(true: Sequence[str], predicted: Sequence[str], kinds: Sequence[str]) -> np.ndarray:
    """Return int64 (kinds, 3): entities that are right, predicted, there; as seqeval counts them."""
    there, said = set(entities(true)), set(entities(predicted))
    numbers = np.zeros((len(kinds), 3), dtype=np.int64)
    for place, found in enumerate((there & said, said, there)):
        for kind, _, _ in found:
            numbers[kinds.index(kind), place] += 1
    return numbers


def rates(right: float, said: float, there: float) -> dict[str, float]:
    """Return f1, precision and recall of so many entities."""
    precision, recall = right / said if said else 0.0, right / there if there else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def marked(encoding: Any, own: list[int], begins: np.ndarray | None) -> np.ndarray:
    """Return int32: the tag of the word that each token begins; -100 for the others.

    Args:
        encoding: of the words.
        own: the tag of each word.
        begins: of each tag, whether an entity, or nothing, begins with it: only whole entities keep their tags.
    """
    owners = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    is_first = (owners >= 0) & (owners != np.concatenate([[-1], owners[:-1]]))
    tags_of_words = np.asarray(own, dtype=np.int32)
    if begins is not None:
        has_token = np.zeros(len(own), dtype=bool)
        has_token[owners[is_first]] = True
        entity = np.cumsum(begins[tags_of_words])
        is_broken = np.bincount(entity, weights=~has_token) > 0
        tags_of_words = np.where(is_broken[entity], IGNORED, tags_of_words)
    return np.where(is_first, tags_of_words[owners], IGNORED).astype(np.int32)


def joined(pieces: list[Any], dtype: Any) -> np.ndarray:
    if not pieces:
        return np.empty(0, dtype)
    return np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces])
