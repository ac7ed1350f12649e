"""What a stage's model answers, right and wrong, out of its examples.json. Pure."""

import json
import re
from collections.abc import Mapping
from typing import Any

from launcher.report import words

MOST_LABELS = 12
"""Of a confusion matrix that is shown whole; of a larger one, the pairs that are confused most."""
MOST_PAIRS, MOST_WRONG, MOST_RIGHT = 15, 25, 12
LONGEST = 1500
"""Letters of one text."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def told(examples: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page shows of a stage's answers; None where there is nothing.

    Args:
        examples: as examples.json has them, the samples that tell most first; every key but `task` and
            `samples` may be absent.
    """
    samples = [each for each in examples.get("samples", []) if isinstance(each, dict)]
    wrong = [each for each in samples if each.get("is_right") is False]
    right = [each for each in samples if each.get("is_right") is True]
    others = [each for each in samples if each.get("is_right") not in (True, False)]
    groups = [
        ("wrong", [_sample(each) for each in wrong[:MOST_WRONG]]),
        ("right", [_sample(each) for each in right[:MOST_RIGHT]]),
        ("", [_sample(each) for each in others[:MOST_WRONG]]),
    ]
    matrix, pairs = _matrix(examples.get("matrix"))
    entities = [_entity(each) for each in examples.get("entities") or [] if isinstance(each, dict)]
    if not (samples or matrix or pairs or entities):
        return None
    return {
        "task": examples.get("task", ""),
        "score": examples.get("score") or "score",
        "num": examples.get("num"),
        "of": examples.get("of"),
        "matrix": matrix,
        "pairs": pairs,
        "entities": entities,
        "groups": [(name, group) for name, group in groups if group],
    }


def _matrix(told: Any) -> tuple[dict[str, Any] | None, list[tuple[str, str, int]]]:
    """A small matrix whole, with the share of each row; of a large one only what is confused most."""
    if not isinstance(told, dict) or not told.get("labels"):
        return None, []
    labels, counts = [str(label) for label in told["labels"]], told["counts"]
    confused = [
        (labels[i], labels[j], int(count))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    confused.sort(key=lambda each: -each[2])
    if len(labels) > MOST_LABELS:
        return None, confused[:MOST_PAIRS]
    rows = []
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        whole = sum(row) or 1
        cells = [(int(n), round(n / whole, 3), i == j) for j, n in enumerate(row)]
        rows.append((label, cells, words.share(row[i] / whole)))
    return {"labels": labels, "rows": rows}, []


def _entity(told: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (words.value(told.get(name)) for name in ("expected", "found", "right"))
    scores = (words.value(told.get(name)) for name in ("precision", "recall", "f1"))
    return (str(told.get("type", "")), *counts, *scores)


def _sample(told: Mapping[str, Any]) -> dict[str, Any]:
    score = told.get("score")
    return {
        "input": _text(told.get("input")),
        "expected": _text(told.get("expected")),
        "answer": _text(told.get("answer")),
        "is_right": told.get("is_right"),
        "score": words.value(float(score)) if isinstance(score, int | float) else "",
    }


def _text(told: Any) -> str:
    if told is None:
        return "-"
    if isinstance(told, list) and all(isinstance(each, str) for each in told):
        told = ", ".join(told)
    if told == "":
        return "(nothing)"
    # An untrained model answers with anything, also with what a page cannot hold.
    text = _CONTROL.sub("\ufffd", told if isinstance(told, str) else json.dumps(told, ensure_ascii=False))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
