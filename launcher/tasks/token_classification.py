"""Token classification: every word gets a tag, e.g. named entities in IOB2; a linear head or a CRF."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.errors import DataError, nearest
from launcher.recipe import Stage
from launcher.tasks import base, crf, shown, tags, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows


class TokenClassification(base.Plain):
    """Columns `tokens`, a list of words, and `tags`, a list of as many tags."""

    auto_model = "AutoModelForTokenClassification"
    metric = "f1"
    loss_unit = "token"
    score = "words right"
    one_sample_per_row = True

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.label_column = stage.data.columns.get("tags", "tags")
        self.tokenizer: Any = None
        self.max_length = 0
        self.marks_spaces = False
        self.words: tuple[str, ...] = ()

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`."""
        base.check_mapping(self.stage, ("tokens", "tags"))
        return [base.column(self.stage, name, present) for name in ("tokens", "tags")]

    def labels(self, rows: "Iterable[Rows]") -> tuple[str, ...]:
        """Return the tags given by the recipe, or those of the train split: O first, the others sorted."""
        where = f"stages.{self.stage.name}.data"
        if self.stage.data.labels is not None:
            if wrong := next(filter(None, map(tags.fault, self.stage.data.labels)), None):
                raise DataError(f"{where}.labels: {wrong}")
            return tuple(self.stage.data.labels)
        # What is no tag is passed over here: `features` rejects its row.
        found: set[str] = set()
        for piece in rows:
            for value in piece.columns[self.label_column]:
                several = value if isinstance(value, list | tuple) else (value,)
                found.update(tag for tag in several if not tags.fault(tag))
        if len(found) < 2:
            raise DataError(
                f'{where}.train: {len(found)} tag(s) of IOB2 or IOBES in column "{self.label_column}" of the train'
                f" split, there must be at least two (numbers need {where}.labels)"
            )
        return tuple(sorted(found, key=lambda word: (word != tags.OUTSIDE, word)))

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """See `Task.set_tokenizer`."""
        tokens.settle(tokenizer)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.marks_spaces = crf.BYTE_LEVEL in tokenizer.backend_tokenizer.to_str()

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; the first token of each word bears its tag."""
        self.words = labels
        names = [base.column(self.stage, name, list(rows.columns)) for name in ("tokens", "tags")]
        sentences, numbers = [], []
        known = {word: i for i, word in enumerate(labels)}
        for i, (words, own) in enumerate(zip(*(rows.columns[name] for name in names), strict=True)):
            why = self._fault(words, own) or self._tag_fault(own, known)
            if why:
                reject(rows.where(i), why)
            else:
                sentences.append(words)
                numbers.append([t if isinstance(t, int) else known[t] for t in own])
        return self._encode(sentences, numbers, is_whole=self.stage.head.constrained)

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        self.words = labels
        return base.label_options(labels)

    def extra(self, labels: tuple[str, ...]) -> "crf.LinearChainCRF | None":
        """See `Task.extra`: the CRF, where the head is one."""
        if self.stage.head.kind != "crf":
            return None
        return crf.LinearChainCRF(labels, tags.allowed(labels) if self.stage.head.constrained else None)

    def save_extra(self, extra: Any, directory: Path) -> None:
        """See `Task.save_extra`."""
        crf.save(extra, directory)

    def load_extra(self, directory: Path) -> "crf.LinearChainCRF | None":
        """See `Task.load_extra`."""
        return crf.load(directory)

    def start_extra(self, extra: Any, directory: Path, labels: tuple[str, ...]) -> None:
        """See `Task.start_extra`; nothing happens where the head before was no CRF."""
        if (before := crf.load(directory)) is not None:
            crf.start(extra, before)

    def outputs(self, model: Any, extra: Any, batch: dict[str, Tensor]) -> base.Outputs:
        """See `Task.outputs`: the logits, or with a CRF all that it scores sequences by."""
        logits = model(**base.model_inputs(batch)).logits
        return logits if extra is None else extra(logits)

    def loss(self, outputs: base.Outputs, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy over the words; with a CRF, the negative log-likelihood of the sequences.

        Both are later divided by the number of words, so that they are of one size.
        """
        if isinstance(outputs, tuple):
            return -crf.log_likelihood(outputs, batch["labels"])
        return F.cross_entropy(
            outputs.flatten(0, 1).float(),
            batch["labels"].flatten(),
            reduction="sum",
            ignore_index=base.IGNORED,
        )

    def measure(
        self, outputs: base.Outputs, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64 (3 x types + 3,): entities right, predicted and there, type by type; the loss sum,
        the number of words, how many of them got their tag."""
        labels, best = batch["labels"].cpu(), self._best(outputs, batch).cpu()
        kinds = self._kinds()
        numbers = np.zeros((len(kinds), 3), dtype=np.int64)
        for true, said in self._sequences(labels, best):
            numbers += tags.count(true, said, kinds)
        here = labels != base.IGNORED
        rest = [float(loss.detach()), int(here.sum()), int((best == labels)[here].sum())]
        return torch.tensor([*numbers.ravel().tolist(), *rest], dtype=torch.float64)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return entity precision, recall and f1 over all types together, word accuracy and loss."""
        loss, words, right_words = sums[-3:].tolist()
        if words == 0:
            return dict.fromkeys(("f1", "precision", "recall", "accuracy", "loss"), math.nan)
        values = tags.rates(*sums[:-3].reshape(-1, 3).sum(0).tolist())
        return values | {"accuracy": right_words / words, "loss": loss / words}

    def tables(self, sums: Tensor) -> dict[str, Any]:
        """See `Task.tables`: of each type how many entities there are, were found, and were found rightly."""
        rows = zip(self._kinds(), sums[:-3].reshape(-1, 3).long().tolist(), strict=True)
        return {
            "entities": [
                {"type": kind, "expected": there, "found": said, "right": right}
                | tags.rates(right, said, there)
                for kind, (right, said, there) in rows
            ]
        }

    def answers(
        self, outputs: base.Outputs, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """See `Task.answers`: lists of tags."""
        sequences = self._sequences(batch["labels"].cpu(), self._best(outputs, batch).cpu())
        return [{"prediction": said, "reference": true} for true, said in sequences if true]

    def shown(
        self, outputs: base.Outputs, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[shown.Shown]:
        """See `Task.shown`: the entities, each with its type and its words; the score is of words."""
        found = []
        pairs = self._sequences(batch["labels"].cpu(), self._best(outputs, batch).cpu())
        rows = (batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
        for ids, mask, labels, (true, said) in zip(*rows, pairs, strict=True):
            words = self._words_of(ids[: sum(mask)], labels)
            expected, answer = (
                [f"{kind}: {' '.join(words[a : b + 1])}" for kind, a, b in tags.entities(own)]
                for own in (true, said)
            )
            wrong = sum(a != b for a, b in zip(true, said, strict=True))
            is_right = tags.entities(true) == tags.entities(said)
            text = tokens.text_of(self.tokenizer, ids[: sum(mask)])
            score = 1 - wrong / max(1, len(true))
            found.append(shown.Shown(text, expected, answer, is_right, score, float(wrong)))
        return found

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Return the tags of each line's words, which spaces part; words beyond the length get O."""
        table = model.config.id2label
        self.words = tuple(table[i] for i in range(len(table)))
        self.set_tokenizer(tokenizer, base.longest_input(self.stage, tokenizer, model))
        sentences = [line.split() for line in lines]
        result = []
        for words in sentences:
            # For a tag each word bears its own place: some words give no token, and those get O.
            made = self._encode([words] if words else [], [list(range(len(words)))] if words else [])
            answer = [tags.OUTSIDE] * len(words)
            if len(made.ragged["input_ids"][1]):
                batch = {
                    name: torch.from_numpy(values.astype(np.int64)).unsqueeze(0).to(model.device)
                    for name, (values, _) in made.ragged.items()
                }
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                best = self._best(self.outputs(model, extra, batch), batch)
                here = batch["labels"] != base.IGNORED
                for place, tag in zip(batch["labels"][here].tolist(), best[here].tolist(), strict=True):
                    answer[place] = self.words[tag]
            result.append(" ".join(answer))
        return result

    def _best(self, outputs: base.Outputs, batch: dict[str, Tensor]) -> Tensor:
        here = batch["labels"] != base.IGNORED
        if isinstance(outputs, tuple):
            return crf.viterbi(outputs, here)
        return torch.where(here, outputs.argmax(-1), base.IGNORED)

    def _sequences(self, labels: Tensor, best: Tensor) -> list[tuple[list[str], list[str]]]:
        """Return (true, predicted) tags of each row's words."""
        here = labels != base.IGNORED
        return [
            ([self.words[i] for i in true[own].tolist()], [self.words[i] for i in said[own].tolist()])
            for true, said, own in zip(labels, best, here, strict=True)
        ]

    def _words_of(self, ids: list[int], labels: list[int]) -> list[str]:
        """Return the words that bear a label: each from its own token to the one before the next."""
        firsts = [i for i, label in enumerate(labels[: len(ids)]) if label != base.IGNORED]
        pieces = [ids[a:b] for a, b in zip(firsts, [*firsts[1:], len(ids)], strict=True)]
        return [tokens.text_of(self.tokenizer, piece) for piece in pieces]

    def _kinds(self) -> list[str]:
        # seqeval takes a label without a prefix for one whose type is what follows its first letter.
        return sorted({tags.parts(word)[1] for word in self.words if word != tags.OUTSIDE})

    def _begins(self) -> np.ndarray:
        """Return for each tag whether it goes on with nothing before it."""
        return np.array([tags.parts(word)[0] not in ("I", "E") for word in self.words])

    def _fault(self, words: Any, own: Any) -> str:
        """Return what is wrong with a row's two lists, and what to do; empty if nothing is."""
        names = {"tokens": words, "tags": own}
        for name, value in names.items():
            if not isinstance(value, list | tuple):
                found = "empty (null)" if value is None else f"a {type(value).__name__}"
                return f'column "{self.stage.data.columns.get(name, name)}" is {found}: it must be a list'
        if len(words) != len(own):
            return f"{len(words)} words but {len(own)} tags: there must be one tag for each word"
        if not words:
            return "a sentence without words: remove the row"
        if not base.are_texts(words) or not all(words):
            i = next(i for i, word in enumerate(words) if not word or base.text_fault(word))
            return f"word {i + 1} is {base.text_fault(words[i]) or 'an empty text'}: fill it in or remove the row"
        return ""

    def _tag_fault(self, own: Sequence[Any], known: dict[str, int]) -> str:
        if self.stage.data.labels is not None and all(type(tag) is int for tag in own):
            wrong = next((tag for tag in own if not 0 <= tag < len(known)), None)
            if wrong is not None:
                return f"tag {wrong}: data.labels names {len(known)} tags, from 0"
            own = [list(known)[tag] for tag in own]
        for i, tag in enumerate(own):
            if why := tags.fault(tag):
                hint = ": name the tags in data.labels" if isinstance(tag, int) else ""
                return f"the tag of word {i + 1} {why}{hint}"
            if tag not in known:
                return f'the tag of word {i + 1}, "{tag}", is not among those of the train split{nearest(tag, known)}'
        if (i := tags.first_break(own, iobes=tags.is_iobes(list(known)))) is not None:
            before = f'after "{own[i - 1]}"' if i else "at the begin"
            return (
                f'the tag of word {i + 1}, "{own[i]}", cannot stand {before}: an entity begins with B- (or S-); write'
                " the tags in IOB2 or IOBES"
            )
        return ""

    def _encode(
        self, sentences: list[list[str]], numbers: list[list[int]], *, is_whole: bool = False
    ) -> base.Features:
        """Turn words to tokens: the first token of each word bears its tag's number.

        Args:
            sentences: words.
            numbers: of each word.
            is_whole: leave out the tags of an entity of which some word has no token, or was cut off: what is
                left would be no valid sequence.
        """
        backend, limit = self.tokenizer.backend_tokenizer, self.max_length
        # Byte-level BPE tells the begin of a word by the space before it.
        mark = " " if self.marks_spaces else ""
        sentences = [[mark + word for word in words] for words in sentences]
        encodings = backend.encode_batch(sentences, is_pretokenized=True)
        full = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        too_long = np.flatnonzero(full > limit).tolist()
        backend.enable_truncation(limit)
        cut = backend.encode_batch([sentences[i] for i in too_long], is_pretokenized=True)
        backend.no_truncation()
        for i, encoding in zip(too_long, cut, strict=True):
            encodings[i] = encoding
        begins = self._begins() if is_whole else None
        marked = [
            tags.marked(encoding, own, begins) for encoding, own in zip(encodings, numbers, strict=True)
        ]
        counts = np.array([np.count_nonzero(own != base.IGNORED) for own in marked], dtype=np.int32)
        kept = [i for i, n in enumerate(counts.tolist()) if n]
        ids, lengths = tokens.ids_of(self.tokenizer, [encodings[i] for i in kept])
        labels = tags.joined([marked[i] for i in kept], np.int32)
        ragged = {"input_ids": (ids, lengths), "labels": (labels, lengths)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            ragged["token_type_ids"] = (tags.joined([encodings[i].type_ids for i in kept], np.uint8), lengths)
        lost = np.maximum(full - limit, 0)[kept]
        return base.Features(
            ragged=ragged,
            scalars={"num_targets": counts[kept]},
            num_skipped=len(sentences) - len(kept),
            num_cut=int(np.count_nonzero(lost)),
            num_cut_tokens=int(lost.sum()),
        )
