"""Generated answers: the settings they are made with, their prompts, and their texts."""

from typing import Any

import torch
from torch import Tensor

from launcher.errors import ModelError, RecipeError
from launcher.recipe import Generation, Stage
from launcher.tasks import base, chat
from launcher.tasks.shown import DOTS


def settings(asked: Generation, tokenizer: Any) -> dict[str, Any]:
    """Return arguments for `generate` that every task wants: the same input gives the same answer."""
    return {
        "max_new_tokens": asked.max_new_tokens,
        "num_beams": asked.beams,
        "do_sample": False,
        # In training the model's config has it off.
        "use_cache": True,
        "pad_token_id": base.padding_id(tokenizer),
    }


def room(asked: Generation, model: Any) -> tuple[int | None, int]:
    """Return the most tokens of a prompt (None: any number) and of its continuation.

    Together they fit into the model's positions, of which at least half are the prompt's.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not limit:
        return None, asked.max_new_tokens
    prompt = max(1, limit - asked.max_new_tokens, limit // 2)
    return prompt, max(1, min(asked.max_new_tokens, limit - prompt))


def decoded(tokenizer: Any, ids: Any) -> list[str]:
    """Return the texts of sequences of ids, without special tokens."""
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def last_runs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the last run of labels in each row.

    Args:
        labels: int64 (rows, length), -100 where there is none.

    Returns:
        int64 (rows,) each: its first position, and the one after its last; twice 0 in a row without labels.
    """
    places = torch.arange(labels.shape[1], device=labels.device)
    is_label = labels != base.IGNORED
    ends = torch.where(is_label, places + 1, 0).amax(1)
    gaps = ~is_label & (places < ends[:, None])
    return torch.where(gaps, places + 1, 0).amax(1), ends


def asked_and_true(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the last run of labels in each row begins, and ends; of one that is the whole row, where its
    second half begins. See `last_runs`."""
    starts, ends = last_runs(labels)
    return torch.where(starts > 0, starts, ends // 2), ends


def prompts(input_ids: Tensor, lengths: Tensor, longest: int | None, padding: int) -> tuple[Tensor, Tensor]:
    """Return the beginnings of rows, padded on the left so that all continuations begin at one position.

    Args:
        input_ids: int64 (rows, length).
        lengths: int64 (rows,): tokens of each beginning, at least 1.
        longest: keep the last so many of them, at most; None: all.
        padding: the id to pad with.

    Returns:
        int64 (rows, width) each: the ids, and the attention mask.
    """
    width = int(lengths.max()) if longest is None else min(int(lengths.max()), longest)
    places = torch.arange(width, device=input_ids.device) + (lengths - width)[:, None]
    mask = places >= 0
    ids = input_ids.gather(1, places.clamp(min=0)).masked_fill(~mask, padding)
    return ids, mask.long()


def end_mark(tokenizer: Any) -> str:
    """Return what the tokenizer's chat template puts after an answer."""
    return chat.end_mark(chat.renderer(tokenizer))


def stopping(tokenizer: Any, mark: str) -> dict[str, Any]:
    """Return settings for `generate` that stop at the template's end mark."""
    if not mark:
        return {}
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    if len(ids) > 1:
        return {"stop_strings": [mark], "tokenizer": tokenizer}
    end = tokenizer.eos_token_id
    return {"eos_token_id": sorted({*ids, *([end] if end is not None else [])})}


def answer(tokenizer: Any, ids: list[int], mark: str) -> str:
    """Return the text of a continuation, up to the template's end mark if it has one."""
    if mark:
        # The mark may be a special token, so it is looked for before those are left out.
        text = tokenizer.decode(ids, skip_special_tokens=False).partition(mark)[0]
        for special in tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text.strip()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def told(tokenizer: Any, ids: list[int], mark: str) -> str:
    """Return the text of a continuation as a person sees it: dots follow where it was stopped before its end."""
    is_ended = tokenizer.eos_token_id in ids or (mark and mark in tokenizer.decode(ids))
    text = answer(tokenizer, ids, mark).strip()
    return text if is_ended else text + DOTS


def continued(model: Any, ids: Tensor, mask: Tensor, settings: dict[str, Any], *, synced: bool) -> Tensor:
    """Return the ids that follow prompts padded on the left."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    whole: Tensor = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=synced, **settings)
    return whole[:, ids.shape[1] :]


def last_answers(
    tokenizer: Any, labels: Tensor, generated: Tensor, mark: str
) -> list[tuple[str, str | None]]:
    """Return for each row the answer generated, and the true one; None if it has none, or no prompt."""
    starts, ends = (places.tolist() for places in last_runs(labels))
    pairs: list[tuple[str, str | None]] = []
    for row, said, start, end in zip(labels.tolist(), generated.tolist(), starts, ends, strict=True):
        true = answer(tokenizer, row[start:end], mark).strip() if start else None
        pairs.append((answer(tokenizer, said, mark).strip(), true))
    return pairs


def said_and_true(tokenizer: Any, best: Tensor, labels: Tensor) -> list[tuple[str, str]]:
    """Return the texts of the ids in `best` at places that have a label, and of those labels, row by row."""
    kept = labels != base.IGNORED
    said, true = (
        decoded(tokenizer, [ids[where].tolist() for ids, where in zip(side, kept, strict=True)])
        for side in (best, labels)
    )
    return list(zip(said, true, strict=True))


def check_exact_match(stage: Stage, layout: str) -> None:
    """Refuse exact_match where a sample is not a conversation with a last answer.

    Raises:
        RecipeError: with what contradicts it.
    """
    data = stage.data
    for is_so, found in (
        (layout == "text", "the data are plain text"),
        (data.loss_on == "all", "data.loss_on is all"),
        (data.split_long, "data.split_long cuts conversations apart"),
    ):
        if is_so:
            raise RecipeError(
                f"stages.{stage.name}.generation.exact_match compares the last answer of a conversation, but"
                f" {found}: leave one of the two out"
            )


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Return the ids that the decoder reads: the labels, moved one to the right.

    Args:
        model: the transformers model.
        labels: int64 (rows, length), -100 ignored.

    Raises:
        ModelError: the config does not say what a text begins with.
    """
    config = model.config
    padding, start = (getattr(config, name, None) for name in ("pad_token_id", "decoder_start_token_id"))
    # mBART looks for the last label of a row; a stand-in row has none, and any id will do.
    is_empty = (labels == base.IGNORED).all(1, keepdim=True)
    labels = labels.masked_fill(is_empty, int(padding == 0))
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        try:
            moved: Tensor = shift(labels=labels)
        except (ValueError, TypeError):
            raise ModelError(
                unset(config, "pad_token_id" if padding is None else "decoder_start_token_id")
            ) from None
        return moved
    for name, value in (("pad_token_id", padding), ("decoder_start_token_id", start)):
        if value is None:
            raise ModelError(unset(config, name))
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == base.IGNORED, padding)


def unset(config: Any, name: str) -> str:
    """Say that a config lacks an id."""
    padding = getattr(config, "pad_token_id", None)
    hint = f", for T5 to pad_token_id ({padding})" if name == "decoder_start_token_id" else ""
    return f"model.config.{name} is not set, and translation needs it: set it{hint}"
