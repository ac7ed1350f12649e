"""Text classification: a text, or a pair of texts, gets one of a fixed set of labels, several, or a number."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from launcher.errors import DataError
from launcher.recipe import Stage
from launcher.tasks import base, label_types, number, shown, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows

_TYPES = {"single": label_types.OneLabel, "multiple": label_types.ManyLabels, "number": number.Number}


class TextClassification(base.Plain):
    """Columns `text`, optionally `text_pair`, and `label`."""

    auto_model = "AutoModelForSequenceClassification"
    loss_unit = "sample"
    one_sample_per_row = True

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.type: Any = _TYPES[stage.data.label_type](stage)
        self.metric: str = self.type.metric
        self.label_column: str | None = self.type.column
        self.score: str = self.type.score
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
        if self.label_column is None:
            return ()
        found: set[str | int] = set()
        for piece in rows:
            found.update(self.type.labels_in(self._values(piece)))
        if len(found) < self.type.fewest:
            raise DataError(
                f"stages.{self.stage.name}.data.train: {len(found)} label(s) in column"
                f' "{self.label_column}" of the train split: classification needs at least {self.type.fewest}'
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
        self.type.words = labels
        found = self.type.read(rows, self._values(rows), reject, bad)
        if bad:
            kept = [i for i in range(len(texts)) if i not in bad]
            texts, found = [texts[i] for i in kept], found[kept]
            pairs = [pairs[i] for i in kept] if pairs is not None else None
        encoded = tokens.encode_cut(self.tokenizer, texts, pairs, self.max_length)
        lost = encoded.lost[encoded.lost > 0]
        has_tokens = encoded.ragged["input_ids"][1] > 0
        ragged = {name: (values, lengths[has_tokens]) for name, (values, lengths) in encoded.ragged.items()}
        found = found[has_tokens]
        scalars = {"num_targets": np.ones(len(found), dtype=np.int32)}
        if found.ndim == 1:
            scalars["labels"] = found
        else:
            ragged["labels"] = found.reshape(-1), np.full(len(found), found.shape[1], dtype=np.int64)
        return base.Features(
            ragged=ragged,
            scalars=scalars,
            num_skipped=int(np.count_nonzero(~has_tokens)),
            num_cut=len(lost),
            num_cut_tokens=int(lost.sum()),
        )

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        self.type.words = labels
        options: dict[str, Any] = self.type.model_options()
        return options

    def example(self, rows: int, length: int, num_labels: int) -> dict[str, tuple[int, ...]]:
        """See `Task.example`: one label a sample, or one for each that it may have."""
        labels = (rows, num_labels) if self.stage.data.label_type == "multiple" else (rows,)
        return super().example(rows, length, num_labels) | {"labels": labels}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the label type's loss over the samples.

        Args:
            outputs: logits (batch, labels), any float.
            batch: `labels` int64 (batch,), or (batch, labels) where there are several; -100 ignored.
        """
        loss: Tensor = self.type.loss(outputs, batch["labels"])
        return loss

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """See `Task.measure`."""
        sums: Tensor = self.type.measure(outputs, batch["labels"], loss)
        return sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """See `Task.metrics`."""
        metrics: dict[str, float] = self.type.metrics(sums)
        return metrics

    def answers(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """See `Task.answers`: a word, a list of words, or a number; after `model_options` or `features`."""
        predicted = self.type.predicted(outputs, self.type.words)
        true = self.type.references(batch["labels"])
        return [{"prediction": p, "reference": t} for p, t in zip(predicted, true, strict=True)]

    def shown(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[shown.Shown]:
        """See `Task.shown`."""
        texts = tokens.texts_of(self.tokenizer, batch)
        found = self.answers(outputs, batch)
        judged = self.type.judged(outputs, batch["labels"])
        return [
            shown.Shown(text, each["reference"], each["prediction"], is_right, score, badness)
            for text, each, (is_right, score, badness) in zip(texts, found, judged, strict=True)
        ]

    def tables(self, sums: Tensor) -> dict[str, Any]:
        """See `Task.tables`: of single labels the matrix."""
        tables: dict[str, Any] = self.type.tables(sums)
        return tables

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Return each line's label, labels joined by commas, or number; where `text_pair` is mapped, a tab parts the two texts."""
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
        logits = model(**encoded.to(model.device)).logits
        return [self.type.line(each) for each in self.type.predicted(logits, model.config.id2label)]

    def _values(self, rows: "Rows") -> list[Any]:
        return rows.columns[base.column(self.stage, "label", list(rows.columns))]
