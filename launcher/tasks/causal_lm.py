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
from launcher.tasks import base, chat, rendering, talks, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows

FORMATS = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
NEW_TOKENS = 128


class CausalLM(base.Plain):
    """Columns `messages`; or `instruction`, `output` and optionally `input`; or `text`."""

    auto_model = "AutoModelForCausalLM"
    metric = "loss"
    is_better_high = False
    label_column = None
    loss_unit = "token"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.format: str | None = None if stage.data.format == "auto" else stage.data.format
        self.tokenizer: Any = None
        self.max_length = 0
        self.renderer: rendering.Renderer | None = None

    @property
    def one_sample_per_row(self) -> bool:
        """See `Task.one_sample_per_row`; before `columns` has settled the format: False."""
        return self.format not in (None, "text") and not self.stage.data.split_long

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
        tokens.settle(tokenizer)
        self.tokenizer, self.max_length, self.renderer = tokenizer, max_length, None
        if self.format != "text":
            tokenizer.chat_template = chat.template(self.stage.data.chat_template, tokenizer.chat_template)

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; a row of plain text, or with split_long any row, may become many samples."""
        present = list(rows.columns)
        layout = self._format(present)
        if layout == "text":
            return self._plain(rows, base.column(self.stage, "text", present), reject)
        return self._chat(rows, self._talks(rows, layout, present, reject), reject)

    def model_options(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """See `Task.model_options`."""
        return {}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy of each next token.

        Args:
            outputs: logits (batch, length, vocabulary), any float.
            batch: `labels` int64 (batch, length), -100 ignored.
        """
        return F.cross_entropy(
            outputs[:, :-1].flatten(0, 1).float(),
            batch["labels"][:, 1:].flatten(),
            reduction="sum",
            ignore_index=base.IGNORED,
        )

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64 (3,): the loss sum, the number of target tokens, how many came first."""
        targets = batch["labels"][:, 1:]
        # The labels are token ids, so an ignored position can never be equal.
        correct = outputs[:, :-1].argmax(-1) == targets
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
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
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

    def _talks(self, rows: "Rows", layout: str, present: Sequence[str], reject: base.Reject) -> talks.Talks:
        if layout == "messages":
            return talks.from_messages(rows, base.column(self.stage, "messages", present), reject)
        return talks.from_instructions(
            rows,
            base.column(self.stage, "instruction", present),
            base.column(self.stage, "output", present),
            base.optional_column(self.stage, "input", present),
            reject,
        )

    def _chat(self, rows: "Rows", conversations: talks.Talks, reject: base.Reject) -> base.Features:
        is_all = self.stage.data.loss_on == "all"
        if self.renderer is None:
            self.renderer = rendering.Renderer(self.tokenizer, wants_edges=not is_all)
        whole = self.renderer(conversations, lambda i, why: reject(rows.where(conversations.rows[i]), why))
        # A chat template writes every special token itself: transformers adds none after it either.
        if is_all:
            ids, lengths = tokens.encode(self.tokenizer, whole.texts, add_special_tokens=False)
            mask = np.ones(len(ids), dtype=np.uint8)
        else:
            (ids, lengths), mask = tokens.encode_spans(
                self.tokenizer, whole.texts, whole.edges, add_special_tokens=False
            )
        return _samples(ids, mask, lengths, self.max_length, self.stage.data.split_long)

    def _plain(self, rows: "Rows", name: str, reject: base.Reject) -> base.Features:
        bad: set[int] = set()
        texts = base.texts(rows, name, reject, bad)
        if bad:
            texts = [text for i, text in enumerate(texts) if i not in bad]
        ids, lengths = tokens.encode(self.tokenizer, texts, add_special_tokens=True)
        if (end := self.tokenizer.eos_token_id) is not None:
            ids, lengths = tokens.with_end((ids, lengths), end)
        return _samples(ids, np.ones(len(ids), dtype=np.uint8), lengths, self.max_length, is_split=True)

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


def _samples(
    ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, size: int, is_split: bool
) -> base.Features:
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
        lengths, owners = tokens.windows(lengths, size)
    else:
        owners, lost = np.arange(len(lengths)), np.maximum(lengths - size, 0)
        if lost.any():
            inside = tokens.heads(lengths, size)
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
    return base.Features(
        ragged={"input_ids": (ids, lengths), "target_mask": (mask, lengths)},
        scalars={"num_targets": counts.astype(np.int32)},
        num_skipped=num_skipped,
        num_cut=int(np.count_nonzero(lost[owners])),
        num_cut_tokens=int(lost[owners].sum()),
    )


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
