"""Causal language modelling: conversations, instructions or plain text, token by token."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.errors import DataError
from launcher.recipe import Stage
from launcher.tasks import base, chat

if TYPE_CHECKING:
    from launcher.data.source import Rows

FORMATS = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
NEW_TOKENS = 128


class CausalLM:
    """Columns `messages`; or `instruction`, `output` and optionally `input`; or `text`."""

    auto_model = "AutoModelForCausalLM"
    metric = "loss"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.format: str | None = None if stage.data.format == "auto" else stage.data.format
        self.tokenizer: Any = None
        self.max_length = 0

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`. Also settles the format, when the recipe leaves it open."""
        base.check_mapping(self.stage, ("messages", "instruction", "input", "output", "text"))
        self.format = self._format(present)
        names = [base.column(self.stage, name, present) for name in FORMATS[self.format]]
        if self.format == "instruction":
            context = base.optional_column(self.stage, "input", present)
            names += [context] if context else []
        return names

    def labels(self, rows: "Iterable[Rows]") -> tuple[str, ...]:
        """Return nothing: there are no label words."""
        return ()

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """Take the tokenizer, and give it the chat template used, so that an export carries it."""
        self.tokenizer, self.max_length = tokenizer, max_length
        if self.format != "text":
            tokenizer.chat_template = chat.template(self.stage.data.chat_template, tokenizer.chat_template)

    def features(self, rows: "Rows", labels: tuple[str, ...]) -> tuple[dict[str, Any], int]:
        """See `Task.features`; a row of plain text may become many samples."""
        present = list(rows.columns)
        layout = self._format(present)
        if layout == "text":
            pieces = self._plain(base.texts(rows, base.column(self.stage, "text", present)))
        else:
            pieces = self._chat(rows, self._conversations(rows, layout))
        features: dict[str, Any] = {"input_ids": [], "labels": [], "num_targets": []}
        skipped = 0
        for samples in pieces:
            # Position 0 has no logits that predict it.
            counts = [int(np.count_nonzero(targets[1:] != base.IGNORED)) for _, targets in samples]
            skipped += not any(counts)
            for (ids, targets), count in zip(samples, counts, strict=True):
                if count:
                    features["input_ids"].append(ids)
                    features["labels"].append(targets.tolist())
                    features["num_targets"].append(count)
        return features, skipped

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        return {}

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy of each next token.

        Args:
            logits: (batch, length, vocabulary), any float.
            batch: `labels` int64 (batch, length), -100 ignored.
        """
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            batch["labels"][:, 1:].flatten(),
            reduction="sum",
            ignore_index=base.IGNORED,
        )

    def measure(self, logits: Tensor, batch: dict[str, Tensor], loss: Tensor) -> Tensor:
        """Return float64 (3,): the loss sum, the number of target tokens, how many came first."""
        targets = batch["labels"][:, 1:]
        # The labels are token ids, so an ignored position can never be equal.
        correct = logits[:, :-1].argmax(-1) == targets
        counts = torch.stack([(targets != base.IGNORED).sum(), correct.sum()]).double()
        return torch.cat([loss.detach().double().reshape(1), counts])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return loss (per token), perplexity and token_accuracy."""
        total, count, correct = sums.tolist()
        if count == 0:
            return dict.fromkeys(("loss", "perplexity", "token_accuracy"), math.nan)
        loss = total / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count}

    @torch.no_grad()
    def predict(self, model: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Continue each line greedily; in chat and instruction stages it is the user's turn."""
        limit = getattr(model.config, "max_position_embeddings", None)
        room = max(1, limit - NEW_TOKENS) if limit else None
        is_chat = self._predicts_chat(tokenizer)
        prompts = [self._prompt(tokenizer, line, is_chat) for line in lines]
        kept = [ids[-room:] if room else ids for ids in prompts]
        width, pad = max(map(len, kept)), base.padding_id(tokenizer)
        # On the left, so that every line's continuation begins at the same position.
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in kept])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in kept])
        mark = chat.end_mark(chat.renderer(tokenizer)) if is_chat else ""
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            **_stopping(tokenizer, mark),
        )
        return [_answer(tokenizer, ids, mark) for ids in output[:, width:].tolist()]

    def _format(self, present: Sequence[str]) -> str:
        if self.stage.data.format != "auto":
            return self.stage.data.format
        mapped = self.stage.data.columns
        # What the recipe maps wins over what the files happen to have besides.
        wished = sorted(FORMATS.items(), key=lambda item: not any(c in mapped for c in item[1]))
        for name, needed in wished:
            if all(mapped.get(column, column) in present for column in needed):
                return name
        where = f"stages.{self.stage.name}.data"
        raise DataError(
            f"{where}: causal-lm reads messages, or instruction and output, or text; the files"
            f" have: {', '.join(present)}; map theirs with {where}.columns,"
            f" e.g. text: {(*present, 'COLUMN')[0]}"
        )

    def _conversations(self, rows: "Rows", layout: str) -> list[list[chat.Message]]:
        present = list(rows.columns)
        if layout == "messages":
            values = rows.columns[base.column(self.stage, "messages", present)]
            return [chat.check_messages(value, rows.where(i)) for i, value in enumerate(values)]
        questions = base.texts(rows, base.column(self.stage, "instruction", present))
        answers = base.texts(rows, base.column(self.stage, "output", present))
        context = base.optional_column(self.stage, "input", present)
        contexts = rows.columns[context] if context else [None] * len(questions)
        return [
            [*chat.instruction_messages(question, extra), {"role": "assistant", "content": answer}]
            for question, extra, answer in zip(questions, contexts, answers, strict=True)
        ]

    def _chat(
        self, rows: "Rows", conversations: list[list[chat.Message]]
    ) -> list[list[tuple[list[int], np.ndarray]]]:
        """Return one sample for each conversation: ids and int64 labels of the same length."""
        if not conversations:
            return []
        render = chat.renderer(self.tokenizer)
        whole = [
            chat.rendered(render, messages, False, rows.where(i)) for i, messages in enumerate(conversations)
        ]
        # A chat template writes every special token itself: transformers adds none after it either.
        encoded = self.tokenizer(
            whole,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pieces = []
        for i, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            if self.stage.data.loss_on == "all":
                targets = np.array(ids, dtype=np.int64)
            else:
                spans = chat.assistant_spans(render, conversations[i], rows.where(i))
                targets = _targets(ids, offsets, spans)
            pieces.append([(ids[: self.max_length], targets[: self.max_length])])
        return pieces

    def _plain(self, texts: list[str]) -> list[list[tuple[list[int], np.ndarray]]]:
        """Return the windows of each text: ids and int64 labels of the same length."""
        if not texts:
            return []
        end = self.tokenizer.eos_token_id
        pieces = []
        for ids in self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            windows = _windows(ids, self.max_length)
            pieces.append([(window, np.array(window, dtype=np.int64)) for window in windows])
        return pieces

    def _predicts_chat(self, tokenizer: Any) -> bool:
        if self.format is not None:
            return self.format != "text"
        mapped = self.stage.data.columns
        if "text" in mapped or "messages" in mapped or "instruction" in mapped:
            return "text" not in mapped
        return tokenizer.chat_template is not None

    def _prompt(self, tokenizer: Any, line: str, is_chat: bool) -> list[int]:
        if is_chat:
            text = chat.renderer(tokenizer)([{"role": "user", "content": line}], True)
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = tokenizer(line, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        first = tokenizer.bos_token_id
        return ids or [first if first is not None else base.padding_id(tokenizer)]


def _targets(ids: list[int], offsets: list[tuple[int, int]], spans: list[chat.Span]) -> np.ndarray:
    """Return int64 labels: the id of each token that begins inside a span, else -100."""
    targets = np.array(ids, dtype=np.int64)
    starts = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    # Spans are in order and apart, so an odd number of edges at or before a start means inside.
    edges = np.array(spans, dtype=np.int64).reshape(-1)
    inside = np.searchsorted(edges, starts, side="right") % 2 == 1
    return np.where(inside, targets, base.IGNORED)


def _windows(ids: list[int], length: int) -> list[list[int]]:
    """Cut ids into consecutive windows of at most `length`, all but the last two of just that."""
    cuts = list(range(0, len(ids), length))
    # A window of one token has nothing to predict: it takes one more from the window before.
    if len(cuts) > 1 and len(ids) - cuts[-1] == 1 and length > 2:
        cuts[-1] -= 1
    return [ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]


def _stopping(tokenizer: Any, mark: str) -> dict[str, Any]:
    """Return settings for generate that stop at the template's end mark."""
    if not mark:
        return {}
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    if len(ids) > 1:
        return {"stop_strings": [mark], "tokenizer": tokenizer}
    end = tokenizer.eos_token_id
    return {"eos_token_id": sorted({*ids, *([end] if end is not None else [])})}


def _answer(tokenizer: Any, ids: list[int], mark: str) -> str:
    if mark:
        # The mark may be a special token, so it is looked for before those are left out.
        text = tokenizer.decode(ids, skip_special_tokens=False).partition(mark)[0]
        for special in tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text.strip()
    return tokenizer.decode(ids, skip_special_tokens=True)
