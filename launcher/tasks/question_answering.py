"""Question answering: the answer is a span of a context, which may be longer than the model can read."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher import exact
from launcher.errors import DataError
from launcher.recipe import Stage
from launcher.tasks import base, shown, squad, tokens, windows

if TYPE_CHECKING:
    from launcher.data.source import Rows

_NO_ROOM = (
    "the question leaves no room for the context within {} tokens: shorten it, or give a larger max_length"
)
_SHOWN = 60
_SHOWN_CONTEXT = 240


class QuestionAnswering(base.Plain):
    """SQuAD's columns: `question`, `context`, `answers`, optionally `id`."""

    auto_model = "AutoModelForQuestionAnswering"
    metric = "f1"
    loss_unit = "sample"
    has_eval_features = True
    is_grouped = True
    score = "F1"
    one_sample_per_row = False

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.tokenizer: Any = None
        self.max_length = 0

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`."""
        base.check_mapping(self.stage, ("id", "question", "context", "answers"))
        name = base.optional_column(self.stage, "id", present)
        needed = [base.column(self.stage, c, present) for c in ("question", "context", "answers")]
        return [*([name] if name else []), *needed]

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """See `Task.set_tokenizer`."""
        tokens.settle(tokenizer)
        self.tokenizer, self.max_length = tokenizer, max_length

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; each window is a sample. `_row` counts the rows of a call.

        For evaluation also: `_window` (from 0 in each row) and `_cls` (the position that says "no answer");
        `_offsets`, two for each token: one more than the characters of the context at which it begins and
        ends, 0 if it is not the context's; and of a row's first window `_context`, `_gold` (JSON) and `_id`.
        """
        present = list(rows.columns)
        bad: set[int] = set()
        names = [base.column(self.stage, name, present) for name in ("question", "context", "answers")]
        asked = base.texts(rows, names[0], reject, bad)
        contexts = base.texts(rows, names[1], reject, bad)
        golds, places = self._answers(rows, names[2], contexts, reject, bad)
        kept = np.array([i for i in range(len(asked)) if i not in bad], dtype=np.int64)
        questions = [asked[i].lstrip() for i in kept]
        texts = [contexts[i] for i in kept]
        rooms = windows.rooms(self.tokenizer, questions, texts, self.max_length)
        for i in kept[rooms <= 0].tolist():
            reject(rows.where(i), _NO_ROOM.format(self.max_length))
        fits = np.flatnonzero(rooms > 0).tolist()
        kept, rooms = kept[fits], rooms[fits]
        questions, texts = [questions[k] for k in fits], [texts[k] for k in fits]
        stride = self.stage.answers.stride
        made = windows.cut(self.tokenizer, questions, texts, rooms, self.max_length, stride)
        # A tokenizer without special tokens makes nothing of two empty texts.
        has_tokens = np.ones(len(kept), dtype=bool)
        has_tokens[made.owners[made.lengths == 0]] = False
        made = made.of(has_tokens)
        starts, ends = places[kept, 0], places[kept, 1]
        spans, has_span = windows.spans(made, starts, ends)
        lost = has_tokens & (starts < ends) & ~has_span
        for i in kept[lost].tolist():
            reject(rows.where(i), f'the tokenizer makes no token of the answer "{_short(golds[i][0])}"')
        spans, made = spans[~lost[made.owners]], made.of(~lost)
        return self._features(rows, made, spans, kept, golds, int(np.count_nonzero(~has_tokens)))

    def _features(
        self,
        rows: "Rows",
        made: windows.Windows,
        spans: np.ndarray,
        kept: np.ndarray,
        golds: list[list[str]],
        num_skipped: int,
    ) -> base.Features:
        count = len(made.owners)
        owners = kept[made.owners]
        ragged: dict[str, base.Ragged] = dict(made.ragged)
        ragged["labels"] = spans.reshape(-1), np.full(count, 2, dtype=np.int64)
        scalars = {"num_targets": np.ones(count, np.int32), "_row": owners.astype(np.int32)}
        if self.for_eval:
            is_first = np.ones(count, dtype=bool)
            is_first[1:] = np.diff(owners) != 0
            heads = np.flatnonzero(is_first)
            number = np.arange(count) - (heads[np.cumsum(is_first) - 1] if count else 0)
            scalars |= {"_window": number.astype(np.int32), "_cls": made.cls.astype(np.int32)}
            ragged["_offsets"] = (made.characters + 1).astype(np.int32).reshape(-1), 2 * made.lengths
            present = list(rows.columns)
            contexts = rows.columns[base.column(self.stage, "context", present)]
            name = base.optional_column(self.stage, "id", present)
            ids = rows.columns[name] if name else rows.numbers
            of_row = {"_context": contexts, "_gold": [json.dumps(gold) for gold in golds], "_id": ids}
            for feature, values in of_row.items():
                texts = ["" if n else str(values[i]) for i, n in zip(owners, number, strict=True)]
                # An id may be text that is no Unicode.
                ragged[feature] = base.to_bytes([t.encode(errors="replace").decode() for t in texts])
        return base.Features(ragged, scalars, num_skipped=num_skipped)

    def _answers(
        self, rows: "Rows", name: str, contexts: list[Any], reject: base.Reject, bad: set[int]
    ) -> tuple[list[list[str]], np.ndarray]:
        """Return each row's answers, and int64 (rows, 2): where the first one begins and ends."""
        golds: list[list[str]] = []
        places = np.zeros((len(contexts), 2), dtype=np.int64)
        for i, value in enumerate(rows.columns[name]):
            found = squad.parsed(value)
            golds.append([text for text, _ in found or []])
            if i in bad:
                continue
            if fault := self._fault(name, found, contexts[i]):
                bad.add(i)
                reject(rows.where(i), fault)
            elif found:
                text, start = found[0]
                # Space at the edges of an answer belongs to no token.
                begin = start + len(text) - len(text.lstrip())
                places[i] = begin, begin + len(text.strip())
        return golds, places

    def _fault(self, name: str, found: list[tuple[str, int]] | None, context: str) -> str:
        if found is None:
            return f'column "{name}" is no {{text: [...], answer_start: [...]}}: write answers as SQuAD does'
        if not found:
            if self.stage.answers.unanswerable:
                return ""
            return "the question has no answer: allow it with answers: {unanswerable: true}, or remove it"
        text, start = found[0]
        if not text.strip():
            return f'column "{name}" has an empty answer: a question without one has no text at all'
        there = context[max(start, 0) : max(start, 0) + len(text)]
        if start >= 0 and there == text:
            return ""
        return (
            f'answer "{_short(text)}" is not in the context at answer_start {start}, there is'
            f' "{_short(there)}": count answer_start in characters, from 0'
        )

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        return {"num_labels": 2}

    def outputs(self, model: Any, extra: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return (batch, length, 2): the logits of a token being the first and the last of the answer."""
        said = model(**base.model_inputs(batch))
        return torch.stack([said.start_logits, said.end_logits], -1)

    def example(self, rows: int, length: int, num_labels: int) -> dict[str, tuple[int, ...]]:
        """See `Task.example`: the answer's first and last token."""
        return super().example(rows, length, num_labels) | {"labels": (rows, 2)}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the mean of the two cross entropies; padding has no part in them."""
        logits = outputs.float()
        if "attention_mask" in batch:
            padding = (batch["attention_mask"] == 0).unsqueeze(-1)
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        entropy = F.cross_entropy(logits, batch["labels"], reduction="sum", ignore_index=base.IGNORED)
        return 0.5 * entropy

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64 (8,): exact matches, F1, and number of the questions; the same three of those
        that have an answer; the loss sum; the number of windows."""
        sums = np.zeros(6)
        for _, prediction, golds in self._judged(outputs, batch):
            # Rounded here, not as a batch's sum, so that the sum of all is the same however they are dealt.
            one = exact.rounded(np.array([*squad.scores(prediction, golds), 1.0]))
            sums += np.concatenate([one, one if golds else np.zeros(3)])
        count = (batch["labels"][:, 0] != base.IGNORED).sum().double()
        counts = torch.from_numpy(sums).to(count.device)
        return torch.cat([counts, torch.stack([loss.detach().double(), count])])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return exact_match and f1 (0 to 100) and loss; where questions may have no answer, also those
        of the ones with an answer and of the ones without."""
        same, f1, count, same_some, f1_some, count_some, loss, num_windows = sums.tolist()
        found = {"exact_match": _percent(same, count), "f1": _percent(f1, count)}
        found["loss"] = loss / num_windows if num_windows else math.nan
        if self.stage.answers.unanswerable:
            found["exact_match_answerable"] = _percent(same_some, count_some)
            found["f1_answerable"] = _percent(f1_some, count_some)
            found["f1_unanswerable"] = _percent(f1 - f1_some, count - count_some)
        return found

    def answers(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """See `Task.answers`; one for each question."""
        return [
            {"id": name, "prediction": prediction, "reference": golds}
            for name, prediction, golds in self._judged(outputs, batch)
        ]

    def shown(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[shown.Shown]:
        """See `Task.shown`: the question, and the context around the answer; the score is SQuAD's F1 (0 to 1)."""
        first = torch.nonzero(batch["_window"] == 0)[:, 0]
        head = {name: batch[name][first] for name in ("input_ids", "attention_mask", "_offsets", "_context")}
        in_context = head["_offsets"].reshape(*head["input_ids"].shape, 2)[..., 1] > 0
        head["attention_mask"] = head["attention_mask"] * ~in_context
        questions, contexts = tokens.texts_of(self.tokenizer, head), base.to_texts(head["_context"])
        found = []
        rows = zip(self._judged(outputs, batch), questions, contexts, strict=True)
        for (_, answer, golds), question, context in rows:
            is_exact, f1 = squad.scores(answer, golds)
            asked = f"{question}\n{shown.piece(context, [*golds, answer], _SHOWN_CONTEXT)}"
            true = list(dict.fromkeys(golds))
            expected = true if len(true) > 1 else "".join(true)
            found.append(shown.Shown(asked, expected, answer, is_exact, f1, 1 - f1))
        return found

    def _judged(self, outputs: Tensor, batch: dict[str, Tensor]) -> list[tuple[str, str, list[str]]]:
        """Return each question's id, the answer chosen, and the true ones."""
        real = batch["labels"][:, 0] != base.IGNORED
        own = {k: batch[k][real] for k in ("_offsets", "_cls", "_window", "_context", "_gold", "_id")}
        if not bool(real.any()):
            return []
        # Windows of a row follow each other; the first of the next has number 0 again.
        first = torch.nonzero(own["_window"] == 0)[:, 0]
        contexts, golds, ids = (base.to_texts(own[k][first]) for k in ("_context", "_gold", "_id"))
        offsets = own["_offsets"].reshape(len(own["_cls"]), -1, 2)
        chosen = self._chosen(outputs[real], offsets, own["_cls"], first.tolist(), contexts)
        return list(zip(ids, chosen, map(json.loads, golds), strict=True))

    def _chosen(
        self, logits: Tensor, offsets: Tensor, cls: Tensor, firsts: list[int], contexts: list[str]
    ) -> list[str]:
        """Return the best answer of each question, over its windows.

        Args:
            logits: (windows, length, 2).
            offsets: (windows, length, 2), as in `features`.
            cls: (windows,).
            firsts: the first window of each question.
            contexts: of each question.
        """
        scores, places = windows.best_spans(logits.float(), offsets, self.stage.answers.longest)
        nulls = logits.float().sum(-1).gather(1, cls.unsqueeze(1))[:, 0].tolist()
        best, spans, said = scores.tolist(), places.tolist(), []
        for first, end, context in zip(firsts, [*firsts[1:], len(best)], contexts, strict=True):
            top = max(range(first, end), key=best.__getitem__)
            is_null = self.stage.answers.unanswerable and min(nulls[first:end]) >= best[top]
            said.append(
                "" if is_null or best[top] == -math.inf else windows.text_between(context, *spans[top])
            )
        return said

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Answer each line: a question, a tab, and its context."""
        if not lines:
            return []
        tokens.settle(tokenizer)
        parts = [line.partition("\t") for line in lines]
        questions, contexts = [part[0].lstrip() for part in parts], [part[2] for part in parts]
        longest = base.longest_input(self.stage, tokenizer, model)
        rooms = windows.rooms(tokenizer, questions, contexts, longest)
        for question in [questions[i] for i in np.flatnonzero(rooms <= 0)]:
            raise DataError(f'question "{_short(question)}": {_NO_ROOM.format(longest)}')
        made = windows.cut(tokenizer, questions, contexts, rooms, longest, self.stage.answers.stride)
        logits = windows.outputs(self, model, tokenizer, made)
        offsets = torch.from_numpy(tokens.rectangle(made.characters + 1, made.lengths, 0))
        firsts = np.searchsorted(made.owners, np.arange(len(lines))).tolist()
        return self._chosen(logits, offsets, torch.from_numpy(made.cls), firsts, contexts)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
