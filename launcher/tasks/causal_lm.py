"""Causal language modelling: conversations, instructions or plain text, token by token."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.errors import DataError, ModelError
from launcher.recipe import Stage
from launcher.tasks import base, chat, generation, next_tokens, rendering, shown, talks, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows

FORMATS = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


class CausalLM(base.Plain):
    """Columns `messages`; or `instruction`, `output` and optionally `input`; or `text`."""

    auto_model = "AutoModelForCausalLM"
    metric = "loss"
    is_better_high = False
    loss_unit = "token"
    generates_shown = True
    score = "probability of a token"
    traced_for = "cuda"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.format: str | None = None if stage.data.format == "auto" else stage.data.format
        self.tokenizer: Any = None
        self.max_length = 0
        self.renderer: rendering.Renderer | None = None
        self.generates = stage.generation.exact_match
        self._end_mark: str | None = None
        self.tiles = next_tokens.Tiles()

    @property
    def one_sample_per_row(self) -> bool:
        """See `Task.one_sample_per_row`; before `columns` has settled the format: False."""
        return self.format not in (None, "text") and not self.stage.data.split_long

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`. Also settles the format, when the recipe leaves it open."""
        base.check_mapping(self.stage, ("messages", "instruction", "input", "output", "text"))
        self.format = self._format(present)
        if self.generates:
            generation.check_exact_match(self.stage, self.format)
        names = [base.column(self.stage, name, present) for name in FORMATS[self.format]]
        if self.format == "instruction":
            context = base.optional_column(self.stage, "input", present)
            names += [context] if context else []
        return names

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """Take the tokenizer, and give it the chat template used, so that an export carries it."""
        tokens.settle(tokenizer)
        self.tokenizer, self.max_length, self.renderer, self._end_mark = tokenizer, max_length, None, None
        if self.format != "text":
            tokenizer.chat_template = chat.template(self.stage.data.chat_template, tokenizer.chat_template)

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; a row of plain text, or with split_long any row, may become many samples."""
        present = list(rows.columns)
        layout = self._format(present)
        if layout == "text":
            return self._plain(rows, base.column(self.stage, "text", present), reject)
        return self._chat(rows, self._talks(rows, layout, present, reject), reject)

    def check_config(self, config: Any) -> None:
        """Refuse the config of an encoder-decoder model.

        Raises:
            ModelError: with what to change.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"causal-lm needs a decoder-only model (Llama, Qwen, GPT-2, ...); {config.model_type} is an"
                " encoder-decoder: give another model.path, or set task: translation"
            )

    def outputs(self, model: Any, extra: Any, batch: dict[str, Tensor]) -> Tensor:
        """See `Task.outputs`: the logits; in training, where they would be large, the loss itself, a scalar."""
        if model.training:
            total = self.tiles.loss(model, base.model_inputs(batch), batch["labels"], self.traced_for)
            if total is not None:
                return total
        logits: Tensor = model(**base.model_inputs(batch)).logits
        return logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy of each next token.

        Args:
            outputs: logits (batch, length, vocabulary), any float; or the sum already.
            batch: `labels` int64 (batch, length), -100 ignored; of a piece of a sequence one longer.
        """
        if outputs.dim() == 0:
            return outputs
        following = batch["labels"][:, 1:]
        return F.cross_entropy(
            outputs[:, : following.shape[1]].flatten(0, 1).float(),
            following.flatten(),
            reduction="sum",
            ignore_index=base.IGNORED,
        )

    @torch.no_grad()
    def generate(
        self, model: Any, batch: dict[str, Tensor], *, synced: bool, limits: dict[str, Any] | None = None
    ) -> Tensor:
        """Return the ids of the last answer of each conversation, from all that stands before it; of a row
        that is nothing but answer, those of its second half."""
        starts, _ = generation.asked_and_true(batch["labels"])
        # A row without labels only stands in for one, and is not judged: its first token will do.
        lengths = starts.clamp(min=1)
        longest, new_tokens = generation.room(self.stage.generation, model)
        padding = base.padding_id(self.tokenizer)
        ids, mask = generation.prompts(batch["input_ids"], lengths, longest, padding)
        settings = self._settings(self.tokenizer, self._mark(), new_tokens) | (limits or {})
        settings["max_new_tokens"] = min(new_tokens, settings["max_new_tokens"])
        return generation.continued(model, ids, mask, settings, synced=synced)

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64 (3,): the loss sum, the number of target tokens, how many came first; with
        exact_match (5,): besides, how many answers were generated as they are, and of how many."""
        targets = batch["labels"][:, 1:]
        # The labels are token ids, so an ignored position can never be equal.
        correct = outputs[:, : targets.shape[1]].argmax(-1) == targets
        counts = torch.stack([(targets != base.IGNORED).sum(), correct.sum()]).double()
        sums = torch.cat([loss.detach().double().reshape(1), counts])
        if not self.generates:
            return sums
        judged = [said == true for said, true in self._pairs(batch, generated) if true is not None]
        matches = torch.tensor([sum(judged), len(judged)], dtype=torch.float64, device=sums.device)
        return torch.cat([sums, matches])

    def answers(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Return the last answers, generated and true; without exact_match for all tokens that bear loss
        those that the model holds most likely, each after the true ones before it."""
        if self.generates:
            pairs = self._pairs(batch, generated)
            return [{"prediction": said, "reference": true or ""} for said, true in pairs]
        # The token at a position is said by the logits before it.
        pairs = generation.said_and_true(self.tokenizer, outputs[:, :-1].argmax(-1), batch["labels"][:, 1:])
        return [{"prediction": said, "reference": true} for said, true in pairs]

    def shown(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[shown.Shown]:
        """See `Task.shown`: what stands before the last answer, the true one, and, where one was generated,
        that; the score is the probability of a true token (geometric mean). A row that is nothing but answer is asked its first half."""
        starts, ends = (places.tolist() for places in generation.asked_and_true(batch["labels"]))
        said: list[str | None] = [None] * len(ends)
        if generated is not None:
            said = [generation.told(self.tokenizer, row, self._mark()) for row in generated.tolist()]
        judged: list[bool | None] = [None] * len(ends)
        if self.generates:
            judged = [answer == true for answer, true in self._pairs(batch, generated)]
        found = []
        for i, (ids, start, end) in enumerate(zip(batch["input_ids"].tolist(), starts, ends, strict=True)):
            labels = batch["labels"][i : i + 1]
            loss = float(self.loss(outputs[i : i + 1], {"labels": labels}) / (labels[:, 1:] >= 0).sum())
            asked = shown.end_of(tokens.text_of(self.tokenizer, ids[:start]))
            true = generation.answer(self.tokenizer, ids[start:end], self._mark()).strip()
            found.append(shown.Shown(asked, true, said[i], judged[i], math.exp(-loss), loss))
        return found

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return loss (per token), perplexity and token_accuracy; exact_match where it is asked for."""
        total, count, correct, *matches = sums.tolist()
        exact = {"exact_match": matches[0] / matches[1] if matches[1] else math.nan} if matches else {}
        if count == 0:
            return {**dict.fromkeys(("loss", "perplexity", "token_accuracy"), math.nan), **exact}
        loss = total / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count, **exact}

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Continue each line; in chat and instruction stages it is the user's turn."""
        is_chat = self._predicts_chat(tokenizer)
        prompts = [torch.tensor(self._prompt(tokenizer, line, is_chat)) for line in lines]
        lengths = torch.tensor([len(ids) for ids in prompts])
        longest, new_tokens = generation.room(self.stage.generation, model)
        whole = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        ids, mask = generation.prompts(whole, lengths, longest, base.padding_id(tokenizer))
        mark = generation.end_mark(tokenizer) if is_chat else ""
        settings = self._settings(tokenizer, mark, new_tokens)
        output = generation.continued(model, ids, mask, settings, synced=False)
        return [generation.answer(tokenizer, row, mark) for row in output.tolist()]

    def _settings(self, tokenizer: Any, mark: str, new_tokens: int) -> dict[str, Any]:
        common = generation.settings(self.stage.generation, tokenizer)
        return {**common, "max_new_tokens": new_tokens, **generation.stopping(tokenizer, mark)}

    def _pairs(self, batch: dict[str, Tensor], generated: Tensor | None) -> list[tuple[str, str | None]]:
        assert generated is not None, "evaluation generates where the task says so"
        return generation.last_answers(self.tokenizer, batch["labels"], generated, self._mark())

    def _mark(self) -> str:
        if self._end_mark is None:
            self._end_mark = "" if self.format == "text" else generation.end_mark(self.tokenizer)
        return self._end_mark

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
        return tokens.samples(ids, mask, lengths, self.max_length, self.stage.data.split_long)

    def _plain(self, rows: "Rows", name: str, reject: base.Reject) -> base.Features:
        bad: set[int] = set()
        texts = base.texts(rows, name, reject, bad)
        if bad:
            texts = [text for i, text in enumerate(texts) if i not in bad]
        ids, lengths = tokens.encode(self.tokenizer, texts, add_special_tokens=True)
        if (end := self.tokenizer.eos_token_id) is not None:
            ids, lengths = tokens.with_end((ids, lengths), end)
        return tokens.samples(ids, np.ones(len(ids), dtype=np.uint8), lengths, self.max_length, is_split=True)

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
