"""Text classification: a text, or a pair of texts, gets one of a fixed set of labels."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.errors import DataError
from launcher.recipe import Stage
from launcher.tasks import base, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows

SHOWN_LABELS = 10
_LABEL_TYPES = {str, int, bool}


class TextClassification(base.Plain):
    """Columns `text`, optionally `text_pair`, and `label`."""

    auto_model = "AutoModelForSequenceClassification"
    metric = "accuracy"
    loss_unit = "sample"
    one_sample_per_row = True

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.label_column = stage.data.columns.get("label", "label")
        self.tokenizer: Any = None
        self.max_length = 0

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`."""
        base.check_mapping(self.stage, ("text", "text_pair", "label"))
        pair = base.optional_column(self.stage, "text_pair", present)
        text = base.column(self.stage, "text", present)
        return [text, *([pair] if pair else []), base.column(self.stage, "label", present)]

    def labels(self, rows: "Iterable[Rows]") -> tuple[str, ...]:
        """Return the labels given by the recipe, or the sorted labels of the train split.

        Values that cannot be labels are passed over here: `features` rejects their rows.
        """
        if self.stage.data.labels is not None:
            return tuple(self.stage.data.labels)
        found: set[str | int] = set()
        for piece in rows:
            values = self._values(piece)
            usable = set(map(type, values)) <= _LABEL_TYPES
            found.update(values if usable else (v for v in values if isinstance(v, str | int)))
        if len(found) < 2:
            raise DataError(
                f"stages.{self.stage.name}.data.train: {len(found)} label(s) in column"
                f' "{self.label_column}" of the train split: classification needs at least two'
            )
        if all(isinstance(value, int) for value in found):
            return tuple(str(value) for value in sorted(found))
        return tuple(sorted({str(value) for value in found}))

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """See `Task.set_tokenizer`."""
        tokens.settle(tokenizer)
        self.tokenizer, self.max_length = tokenizer, max_length

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; a row is skipped if the tokenizer makes no token of it."""
        present = list(rows.columns)
        pair = base.optional_column(self.stage, "text_pair", present)
        bad: set[int] = set()
        texts = base.texts(rows, base.column(self.stage, "text", present), reject, bad)
        pairs = base.texts(rows, pair, reject, bad) if pair else None
        ids = self._label_ids(rows, labels, reject, bad)
        if bad:
            kept = [i for i in range(len(texts)) if i not in bad]
            texts, ids = [texts[i] for i in kept], ids[kept]
            pairs = [pairs[i] for i in kept] if pairs is not None else None
        encoded = tokens.encode_cut(self.tokenizer, texts, pairs, self.max_length)
        lost = encoded.lost[encoded.lost > 0]
        has_tokens = encoded.ragged["input_ids"][1] > 0
        ragged = {name: (values, lengths[has_tokens]) for name, (values, lengths) in encoded.ragged.items()}
        ids = ids[has_tokens]
        return base.Features(
            ragged=ragged,
            scalars={"labels": ids, "num_targets": np.ones(len(ids), dtype=np.int32)},
            num_skipped=int(np.count_nonzero(~has_tokens)),
            num_cut=len(lost),
            num_cut_tokens=int(lost.sum()),
        )

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {word: i for i, word in enumerate(labels)},
        }

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy.

        Args:
            outputs: logits (batch, labels), any float.
            batch: `labels` int64 (batch,), -100 ignored.
        """
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum", ignore_index=base.IGNORED)

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64 (labels² + 2,): the confusion matrix [true, predicted], row by row; the
        loss sum; the number of labels."""
        num_labels = outputs.shape[-1]
        known = batch["labels"] != base.IGNORED
        cells = batch["labels"][known] * num_labels + outputs[known].argmax(-1)
        confusion = torch.bincount(cells, minlength=num_labels**2).double()
        return torch.cat([confusion, torch.stack([loss.detach().double(), known.sum().double()])])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the labels that occur or were predicted) and loss."""
        count = float(sums[-1])
        if count == 0:
            return dict.fromkeys(("accuracy", "macro_f1", "loss"), math.nan)
        num_labels = math.isqrt(len(sums) - 2)
        confusion = sums[:-2].reshape(num_labels, num_labels)
        hits, seen = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
        f1 = 2 * hits[seen > 0] / seen[seen > 0]
        return {
            "accuracy": float(hits.sum()) / count,
            "macro_f1": float(f1.mean()),
            "loss": float(sums[-2]) / count,
        }

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Return each line's label word; where `text_pair` is mapped, a tab parts the two texts."""
        firsts, seconds = lines, None
        if "text_pair" in self.stage.data.columns:
            parts = [line.partition("\t") for line in lines]
            firsts, seconds = [part[0] for part in parts], [part[2] for part in parts]
        longest = base.longest_input(self.stage, tokenizer, model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(base.padding_id(tokenizer))
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        encoded = tokenizer(
            firsts,
            seconds,
            truncation=True,
            max_length=longest,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        best = model(**encoded.to(model.device)).logits.argmax(-1).tolist()
        return [model.config.id2label[i] for i in best]

    def _values(self, rows: "Rows") -> list[Any]:
        return rows.columns[base.column(self.stage, "label", list(rows.columns))]

    def _label_ids(
        self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject, bad: set[int]
    ) -> np.ndarray:
        """Return the int32 index of each row's label; any number for the rows in `bad`."""
        values = self._values(rows)
        if not set(map(type, values)) <= _LABEL_TYPES:
            values = self._usable(rows, values, reject, bad)
        given = self.stage.data.labels is not None
        if not given and bool in set(map(type, values)):
            values = list(map(str, values))  # else True and 1 are the same key
        known: dict[Any, int] = {word: i for i, word in enumerate(labels)}
        # A number is an index only into names that the recipe gives; else it is its own name.
        table = {
            value: (int(value) if 0 <= value < len(labels) else -1)
            if given and not isinstance(value, str)
            else known.get(str(value), -1)
            for value in set(values)
        }
        ids = np.fromiter(map(table.__getitem__, values), dtype=np.int32, count=len(values))
        for i in np.flatnonzero(ids < 0).tolist():
            if i not in bad:
                bad.add(i)
                reject(rows.where(i), self._unknown_label(values[i], labels))
        return ids

    def _usable(self, rows: "Rows", values: list[Any], reject: base.Reject, bad: set[int]) -> list[Any]:
        """Reject the rows whose value cannot be a label; return the values with "" in their place."""
        wrong = [i for i, value in enumerate(values) if not isinstance(value, str | int)]
        usable = list(values)
        for i in wrong:
            usable[i] = ""
            if i not in bad:
                found = "empty (null)" if values[i] is None else f"a {type(values[i]).__name__}"
                bad.add(i)
                reject(
                    rows.where(i),
                    f'column "{self.label_column}" is {found}: a label is a word or an integer',
                )
        return usable

    def _unknown_label(self, value: object, labels: tuple[str, ...]) -> str:
        shown = ", ".join(labels[:SHOWN_LABELS]) + (", ..." if len(labels) > SHOWN_LABELS else "")
        if self.stage.data.labels is not None:
            return f'label "{value}" is not among the recipe\'s data.labels ({shown})'
        return f'label "{value}" does not occur in the train split (its labels: {shown})'
