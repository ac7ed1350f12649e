"""SQuAD's answers: how they are written; exact match and F1, as SQuAD's official script (version 2) defines them."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation and English articles, singly spaced."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def scores(prediction: str, references: Sequence[str]) -> tuple[bool, float]:
    """Return the exact match and the F1 (0 to 1) of the reference that each fits best.

    Args:
        prediction: the answer; "" says that there is none.
        references: the true answers; none, or only such as normalise to nothing: there is no answer.
    """
    said = normalised(prediction)
    golds = [gold for gold in map(normalised, references) if gold] or [""]
    return said in golds, max(_f1(said.split(), gold.split()) for gold in golds)


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    shared = (Counter(said) & Counter(gold)).total()
    # Precision and recall first, as the script does: another order rounds otherwise.
    precision, recall = shared / len(said), shared / len(gold)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def parsed(value: Any) -> list[tuple[str, int]] | None:
    """Return (text, start) of each answer; None if they are not written as they should be."""
    if value is None:
        return []
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if texts is None and starts is None:
            return [] if not value or set(value) <= {"text", "answer_start"} else None
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return None
        found = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        found = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        return None
    return found if all(isinstance(t, str) and isinstance(s, int) for t, s in found) else None
