"""Translation: a text becomes another text, by an encoder-decoder model."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.errors import ModelError
from launcher.recipe import Stage
from launcher.tasks import base, generation, shown, text_metrics, tokens

if TYPE_CHECKING:
    from launcher.data.source import Rows

_NUM_LOSS_SUMS = 3


class Translation(base.Plain):
    """Columns `source` and `target`."""

    auto_model = "AutoModelForSeq2SeqLM"
    metric = "bleu"
    loss_unit = "token"
    one_sample_per_row = True
    has_eval_features = True
    generates = True
    score = "chrF"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.tokenizer: Any = None
        self.max_length = 0

    def columns(self, present: Sequence[str]) -> list[str]:
        """See `Task.columns`."""
        base.check_mapping(self.stage, ("source", "target"))
        return [base.column(self.stage, name, present) for name in ("source", "target")]

    def set_tokenizer(self, tokenizer: Any, max_length: int) -> None:
        """See `Task.set_tokenizer`.

        Raises:
            ModelError: it has no token that could end a text.
        """
        tokens.settle(tokenizer)
        if tokenizer.eos_token_id is None and not _specials(tokenizer):
            raise ModelError(
                "translation: the tokenizer has no eos_token, so that no translation could end: give"
                " model.tokenizer one that has"
            )
        self.tokenizer, self.max_length = tokenizer, max_length

    def features(self, rows: "Rows", labels: tuple[str, ...], reject: base.Reject) -> base.Features:
        """See `Task.features`; a row is skipped if the tokenizer, or the cut, leaves nothing of a side."""
        present, bad = list(rows.columns), set[int]()
        sides = [
            _filled(rows, base.column(self.stage, n, present), reject, bad) for n in ("source", "target")
        ]
        sources, targets = ([text for i, text in enumerate(side) if i not in bad] for side in sides)
        source = tokens.encode_cut(self.tokenizer, self._prefixed(sources), None, self.max_length)
        (ids, lengths), lost = source.ragged["input_ids"], source.lost
        (label_ids, label_lengths), label_lost, num_added = self._encode_targets(targets)
        kept = (lengths > 0) & (label_lengths > num_added)
        ragged = {
            "input_ids": (ids[np.repeat(kept, lengths)], lengths[kept]),
            "labels": (label_ids[np.repeat(kept, label_lengths)].astype(np.int32), label_lengths[kept]),
        }
        if self.for_eval:
            ragged["_reference"] = base.to_bytes([t for t, k in zip(targets, kept, strict=True) if k])
        all_lost = (lost + label_lost)[kept]
        return base.Features(
            ragged=ragged,
            scalars={"num_targets": label_lengths[kept].astype(np.int32)},
            num_skipped=int(np.count_nonzero(~kept)),
            num_cut=int(np.count_nonzero(all_lost)),
            num_cut_tokens=int(all_lost.sum()),
        )

    def check_config(self, config: Any) -> None:
        """Refuse the config of a model that cannot translate, or that does not fit the tokenizer.

        Raises:
            ModelError: with what to change.
        """
        check_model(config)
        theirs = getattr(config, "eos_token_id", None)
        ours = getattr(self.tokenizer, "eos_token_id", None)
        if theirs is None or ours is None:
            return
        if ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise ModelError(
                f"model.config.eos_token_id is {theirs}, but the tokenizer ends texts with {ours}"
                f' ("{self.tokenizer.eos_token}"): set it to {ours}, or give the model\'s own tokenizer'
            )

    def outputs(self, model: Any, extra: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits (rows, longest target, vocabulary), where the decoder is told what came before."""
        logits: Tensor = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=generation.decoder_inputs(model, batch["labels"]),
            use_cache=False,
        ).logits
        return logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropy of each target token.

        Args:
            outputs: logits (rows, length, vocabulary), any float.
            batch: `labels` int64 (rows, length), -100 ignored.
        """
        return F.cross_entropy(
            outputs.flatten(0, 1).float(),
            batch["labels"].flatten(),
            reduction="sum",
            ignore_index=base.IGNORED,
        )

    @torch.no_grad()
    def generate(
        self, model: Any, batch: dict[str, Tensor], *, synced: bool, limits: dict[str, Any] | None = None
    ) -> Tensor:
        """Return the ids of the translations, with the decoder's first token."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return self._generate(model, ids, mask, self.tokenizer, synced=synced, **limits or {})

    def measure(
        self, outputs: Tensor, batch: dict[str, Tensor], loss: Tensor, generated: Tensor | None = None
    ) -> Tensor:
        """Return float64: the loss sum, the number of target tokens, how many came first; then what
        `text_metrics.sums` gives of the rows with labels (zeros if nothing was generated)."""
        labels, rouge = batch["labels"], self.stage.generation.rouge
        # The labels are token ids, so an ignored position can never be equal.
        correct = outputs.argmax(-1) == labels
        counts = torch.stack([(labels != base.IGNORED).sum(), correct.sum()]).double()
        texts = [0.0] * text_metrics.num_sums(rouge=rouge)
        if generated is not None:
            is_real = (labels != base.IGNORED).any(1).tolist()
            pairs = [p for p, real in zip(self._pairs(batch, generated), is_real, strict=True) if real]
            texts = text_metrics.sums([said for said, _ in pairs], [true for _, true in pairs], rouge=rouge)
        added = torch.tensor(texts, dtype=torch.float64, device=loss.device)
        return torch.cat([loss.detach().double().reshape(1), counts, added])

    def answers(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """See `Task.answers`."""
        assert generated is not None, "evaluation generates where the task says so"
        return [{"prediction": said, "reference": true} for said, true in self._pairs(batch, generated)]

    def shown(
        self, outputs: Tensor, batch: dict[str, Tensor], generated: Tensor | None = None
    ) -> list[shown.Shown]:
        """See `Task.shown`; the score is the chrF of the text alone."""
        found = []
        texts = tokens.texts_of(self.tokenizer, batch)
        for text, each in zip(texts, self.answers(outputs, batch, generated), strict=True):
            score = text_metrics.chrf_of(each["prediction"], each["reference"])
            found.append(
                shown.Shown(text, each["reference"], each["prediction"], None, score, badness=-score)
            )
        return found

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return bleu, chrf, loss (per token), perplexity, token_accuracy, and the ROUGEs asked for."""
        values = sums.tolist()
        total, count, correct = values[:_NUM_LOSS_SUMS]
        loss = total / count if count else math.nan
        of_texts = text_metrics.scores(values[_NUM_LOSS_SUMS:], rouge=self.stage.generation.rouge)
        of_tokens = {
            "loss": loss,
            "perplexity": math.inf if loss >= 700 else math.exp(loss),
            "token_accuracy": correct / count if count else math.nan,
        }
        first = {name: of_texts.pop(name) for name in ("bleu", "chrf")}
        return {**first, **of_tokens, **of_texts}

    def signature(self) -> str:
        """Return sacrebleu's signature of `bleu`."""
        return self.notes()["bleu"]

    def notes(self) -> dict[str, str]:
        """Return, for metrics that others must be able to repeat, how they are computed."""
        return text_metrics.signatures()

    @torch.no_grad()
    def predict(self, model: Any, extra: Any, tokenizer: Any, lines: list[str]) -> list[str]:
        """Translate each line; an empty one stays empty, since training saw none."""
        tokens.settle(tokenizer)
        longest = base.longest_input(self.stage, tokenizer, model)
        answers, asked = [""] * len(lines), [i for i, line in enumerate(lines) if line.strip()]
        texts = self._prefixed([lines[i] for i in asked])
        ids, lengths = tokens.encode_cut(tokenizer, texts, None, longest).ragged["input_ids"]
        asked = [i for i, length in zip(asked, lengths, strict=True) if length]
        if not asked:
            return answers
        lengths = lengths[lengths > 0]
        rows = tokens.rectangle(ids, lengths, base.padding_id(tokenizer))
        mask = tokens.rectangle(np.ones_like(ids), lengths, 0)
        inputs = (torch.from_numpy(part).to(model.device) for part in (rows, mask))
        generated = self._generate(model, *inputs, tokenizer, synced=False)
        for i, text in zip(asked, generation.decoded(tokenizer, generated), strict=True):
            answers[i] = text
        return answers

    def _prefixed(self, texts: list[str]) -> list[str]:
        prefix = self.stage.data.prefix
        return [prefix + text for text in texts] if prefix else texts

    def _encode_targets(self, texts: list[str]) -> tuple[base.Ragged, np.ndarray, int]:
        """Return the ids of the targets, each with an end; the tokens each lost; how many are special."""
        tokenizer = self.tokenizer
        # Of some tokenizers (mBART, NLLB) the two languages have special tokens of their own.
        _switch(tokenizer, "_switch_to_target_mode")
        try:
            special, end = _specials(tokenizer), tokenizer.eos_token_id
            adds_end = end is None or end in special
            limit = self.max_length if adds_end else max(1, self.max_length - 1)
            cut = tokens.encode_cut(tokenizer, texts, None, limit)
        finally:
            _switch(tokenizer, "_switch_to_input_mode")
        ragged = cut.ragged["input_ids"]
        if adds_end:
            return ragged, cut.lost, len(special)
        return tokens.with_end(ragged, end), cut.lost, len(special) + 1

    def _generate(
        self, model: Any, ids: Tensor, mask: Tensor, tokenizer: Any, *, synced: bool, **limits: Any
    ) -> Tensor:
        end = tokenizer.eos_token_id
        generated: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            synced_gpus=synced,
            **generation.settings(self.stage.generation, tokenizer) | limits,
            **({} if end is None else {"eos_token_id": end}),
        )
        return generated

    def _pairs(self, batch: dict[str, Tensor], generated: Tensor) -> list[tuple[str, str]]:
        """Return for each row the translation and the reference."""
        said = generation.decoded(self.tokenizer, generated)
        return list(zip(said, base.to_texts(batch["_reference"]), strict=True))


def check_model(config: Any) -> None:
    """Refuse the transformers config of a model that is no encoder-decoder, or that cannot start a text.

    Raises:
        ModelError: with what to change.
    """
    kind = getattr(config, "model_type", "") or type(config).__name__
    if not getattr(config, "is_encoder_decoder", False):
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        found = "an encoder" if kind in ENCODERS else "a decoder"
        raise ModelError(
            f"translation needs an encoder-decoder model (T5, BART, Marian, ...); {kind} is {found} only:"
            " give another model.path or model.config"
        )
    size = getattr(config, "decoder_vocab_size", None) or getattr(config, "vocab_size", None)
    for name in ("decoder_start_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        # mBART starts with the language token that its labels end with.
        if value is None and not (kind in ("mbart", "plbart") and name == "decoder_start_token_id"):
            raise ModelError(generation.unset(config, name))
        if value is not None and size is not None and not 0 <= value < size:
            raise ModelError(
                f"model.config.{name} is {value}, but vocab_size is {size}: set it to a token's id"
            )


def _specials(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer adds to every text."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    return [i for i, is_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if is_added]


def _switch(tokenizer: Any, mode: str) -> None:
    change = getattr(tokenizer, mode, None)
    if change is not None:
        change()


def _filled(rows: "Rows", name: str, reject: base.Reject, bad: set[int]) -> list[Any]:
    """Return a column that must hold a text with something in it in every row; see `base.texts`."""
    values = base.texts(rows, name, reject, bad)
    for i, value in enumerate(values):
        if i not in bad and not value.strip():
            bad.add(i)
            reject(rows.where(i), f'column "{name}" is an empty text: fill it in or remove the row')
    return values
