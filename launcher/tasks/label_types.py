"""What a text is labelled with (`data.label_type`): one word of a fixed set, or any number of them."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.recipe import Stage
from launcher.tasks import base

if TYPE_CHECKING:
    from launcher.data.source import Rows

SHOWN_LABELS = 10
MOST_IN_MATRIX = 100
LABEL_TYPES = {str, int, bool}


class _Words:
    """Labels that are words of a fixed set."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.column: str | None = stage.data.columns.get("label", "label")
        self.words: tuple[str, ...] = ()

    def options(self, problem: str) -> dict[str, Any]:
        return {**base.label_options(self.words), "problem_type": problem}

    def labels_in(self, values: Sequence[Any]) -> list[str | int]:
        """Return the labels in a column's values, which may be lists of them."""
        flat = itertools.chain.from_iterable(v if isinstance(v, list | tuple) else (v,) for v in values)
        return [label for label in flat if isinstance(label, str | int)]

    def indices(self, values: Sequence[Any]) -> np.ndarray:
        """Return the int32 index of each label; -1 for one that is unknown."""
        given = self.stage.data.labels is not None
        if not given and bool in set(map(type, values)):
            values = list(map(str, values))  # else True and 1 are the same key
        known: dict[Any, int] = {word: i for i, word in enumerate(self.words)}
        # A number is an index only into names that the recipe gives; else it is its own name.
        table = {
            value: (int(value) if 0 <= value < len(self.words) else -1)
            if given and not isinstance(value, str)
            else known.get(str(value), -1)
            for value in set(values)
        }
        return np.fromiter(map(table.__getitem__, values), dtype=np.int32, count=len(values))

    def unknown(self, value: object) -> str:
        shown = ", ".join(self.words[:SHOWN_LABELS]) + (", ..." if len(self.words) > SHOWN_LABELS else "")
        if self.stage.data.labels is not None:
            return f'label "{value}" is not among the recipe\'s data.labels ({shown})'
        return f'label "{value}" does not occur in the train split (its labels: {shown})'


class OneLabel(_Words):
    """One of a fixed set of labels; judged by accuracy."""

    metric = "accuracy"
    score = "confidence"
    fewest = 2

    def model_options(self) -> dict[str, Any]:
        """See `Task.model_options`."""
        return self.options("single_label_classification")

    def read(self, rows: "Rows", values: list[Any], reject: base.Reject, bad: set[int]) -> np.ndarray:
        """Return the int32 index of each row's label; any number for the rows in `bad`."""
        if not set(map(type, values)) <= LABEL_TYPES:
            values = self._usable(rows, values, reject, bad)
        ids = self.indices(values)
        for i in np.flatnonzero(ids < 0).tolist():
            reject_row(rows, i, self.unknown(values[i]), reject, bad)
        return ids

    def _usable(self, rows: "Rows", values: list[Any], reject: base.Reject, bad: set[int]) -> list[Any]:
        """Reject the rows whose value cannot be a label; return the values with "" in their place."""
        usable = list(values)
        for i, value in enumerate(values):
            if not isinstance(value, str | int):
                usable[i] = ""
                fault = f'column "{self.column}" is {kind(value)}: a label is a word or an integer'
                reject_row(rows, i, fault, reject, bad)
        return usable

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross entropy; labels are int64 (batch,), -100 ignored."""
        return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=base.IGNORED)

    def measure(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """Return float64 (labels² + 2,): the confusion matrix [true, predicted], row by row; the
        loss sum; the number of samples."""
        num_labels = logits.shape[-1]
        known = labels != base.IGNORED
        cells = labels[known] * num_labels + logits[known].argmax(-1)
        confusion = torch.bincount(cells, minlength=num_labels**2).double()
        return torch.cat([confusion, torch.stack([loss.detach().double(), known.sum().double()])])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the labels that occur or were predicted) and loss."""
        count = float(sums[-1])
        if count == 0:
            return dict.fromkeys(("accuracy", "macro_f1", "loss"), math.nan)
        num_labels = math.isqrt(len(sums) - 2)
        confusion = sums[:-2].reshape(num_labels, num_labels)
        hits = confusion.diagonal()
        return {
            "accuracy": float(hits.sum()) / count,
            "macro_f1": _macro_f1(hits, confusion.sum(0) + confusion.sum(1)),
            "loss": float(sums[-2]) / count,
        }

    def tables(self, sums: Tensor) -> dict[str, Any]:
        """See `Task.tables`: rows are expected, columns answered; nothing where that is too large to look at."""
        num_labels = math.isqrt(len(sums) - 2)
        if num_labels > MOST_IN_MATRIX:
            return {}
        counts = sums[:-2].reshape(num_labels, num_labels).long().tolist()
        return {"matrix": {"labels": list(self.words), "counts": counts}}

    def judged(self, logits: Tensor, labels: Tensor) -> list[tuple[bool | None, float | None, float]]:
        """Return of each row whether it is right, the probability of the best word, and how telling it is:
        most of all what is held for sure, and wrong."""
        sure, best = logits.float().softmax(-1).max(-1)
        pairs = zip((best == labels).tolist(), sure.tolist(), strict=True)
        return [(is_right, p, 1 - p if is_right else 1 + p) for is_right, p in pairs]

    def predicted(self, logits: Tensor, words: Sequence[str]) -> list[Any]:
        """Return the best word of each row."""
        return [words[i] for i in logits.argmax(-1).tolist()]

    def references(self, labels: Tensor) -> list[Any]:
        """Return the word of each row; None where it has no label."""
        return [None if i == base.IGNORED else self.words[i] for i in labels.tolist()]

    def line(self, prediction: Any) -> str:
        """Return a prediction as a line of text."""
        return str(prediction)


class ManyLabels(_Words):
    """Any number of a fixed set of labels, each decided by itself; judged by the F1 of all decisions."""

    metric = "micro_f1"
    score = ""
    fewest = 1

    def model_options(self) -> dict[str, Any]:
        """See `Task.model_options`."""
        return self.options("multi_label_classification")

    def read(self, rows: "Rows", values: list[Any], reject: base.Reject, bad: set[int]) -> np.ndarray:
        """Return uint8 (rows, labels): 1 where a row has a label; anything for the rows in `bad`."""
        if not set(map(type, values)) <= {list, tuple}:
            values = [value if isinstance(value, list | tuple) else None for value in values]
        owners = np.repeat(np.arange(len(values)), [len(value or ()) for value in values])
        flat = [label for value in values for label in value or ()]
        wrong = [i for i, label in enumerate(flat) if not isinstance(label, str | int)]
        for i in wrong:
            flat[i] = ""
        ids = self.indices(flat)
        ids[wrong] = -1
        for i in np.unique(owners[ids < 0]).tolist():
            reject_row(rows, i, self._fault(values[i]), reject, bad)
        for i, value in enumerate(values):
            if value is None:
                found = kind(rows.columns[self.column or ""][i])
                fault = f"is {found}: label_type: multiple needs a list of labels, [] for none"
                reject_row(rows, i, f'column "{self.column}" {fault}', reject, bad)
        matrix = np.zeros((len(values), len(self.words)), dtype=np.uint8)
        matrix[owners[ids >= 0], ids[ids >= 0]] = 1
        return matrix

    def _fault(self, labels: Sequence[Any]) -> str:
        for label in labels:
            if not isinstance(label, str | int):
                return f'column "{self.column}" holds {kind(label)}: a label is a word or an integer'
        return self.unknown(labels[int(np.flatnonzero(self.indices(labels) < 0)[0])])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the samples the mean binary cross entropy of their labels, int64 (batch, labels); -100
        ignored."""
        known = (labels != base.IGNORED).float()
        targets = labels.clamp(min=0).float()
        total = F.binary_cross_entropy_with_logits(logits.float(), targets, weight=known, reduction="sum")
        return total / labels.shape[-1]

    def measure(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """Return float64 (3 labels + 3,): for each label its hits, then how often it was predicted, then how
        often it is true; the samples that are right in all labels; the loss sum; the number of samples."""
        known = labels[:, 0] != base.IGNORED
        true, predicted = labels[known] == 1, logits[known] > 0
        counts = torch.cat([(true & predicted).sum(0), predicted.sum(0), true.sum(0)])
        exact = (true == predicted).all(-1).sum()
        rest = torch.stack([exact.double(), loss.detach().double(), known.sum().double()])
        return torch.cat([counts.double(), rest])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return micro_f1, macro_f1 (over the labels that occur or were predicted; 0 without any),
        exact_match and loss."""
        count = float(sums[-1])
        if count == 0:
            return dict.fromkeys(("micro_f1", "macro_f1", "exact_match", "loss"), math.nan)
        hits, predicted, true = sums[:-3].reshape(3, -1)
        seen = predicted + true
        return {
            "micro_f1": 2 * float(hits.sum()) / max(1.0, float(seen.sum())),
            "macro_f1": _macro_f1(hits, seen),
            "exact_match": float(sums[-3]) / count,
            "loss": float(sums[-2]) / count,
        }

    def tables(self, sums: Tensor) -> dict[str, Any]:
        """See `Task.tables`: none."""
        return {}

    def judged(self, logits: Tensor, labels: Tensor) -> list[tuple[bool | None, float | None, float]]:
        """Return of each row whether it is right in all labels, no score, and in how many it is wrong."""
        wrong = ((logits > 0) != (labels == 1)).sum(-1).tolist()
        return [(n == 0, None, float(n)) for n in wrong]

    def predicted(self, logits: Tensor, words: Sequence[str]) -> list[Any]:
        """Return the words of each row whose logit is above 0."""
        return [[words[i] for i in np.flatnonzero(row)] for row in (logits > 0).cpu().numpy()]

    def references(self, labels: Tensor) -> list[Any]:
        """Return the words of each row."""
        return [[self.words[i] for i in np.flatnonzero(row)] for row in (labels == 1).cpu().numpy()]

    def line(self, prediction: Any) -> str:
        """Return a prediction as a line of text."""
        return ",".join(prediction)


def _macro_f1(hits: Tensor, seen: Tensor) -> float:
    """Return the mean F1 of the labels that occur or were predicted."""
    f1 = 2 * hits[seen > 0] / seen[seen > 0]
    return float(f1.mean()) if len(f1) else 0.0


def kind(value: object) -> str:
    if value is None:
        return "empty (null)"
    return f"{value}" if isinstance(value, float) else f"a {type(value).__name__}"


def reject_row(rows: "Rows", i: int, fault: str, reject: base.Reject, bad: set[int]) -> None:
    if i not in bad:
        bad.add(i)
        reject(rows.where(i), fault)
