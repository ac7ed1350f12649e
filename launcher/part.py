"""One stage's task and data on one rank: what it trains and is judged on. A joint stage has several."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from launcher import tasks
from launcher.data import feed
from launcher.data.order import Integers
from launcher.data.split import Split
from launcher.data.store import Store
from launcher.plan.plan import StageFacts, StagePlan
from launcher.recipe import Stage

PROBE_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Seat:
    """Which rank this is, and the id that its batches are padded with.

    Attributes:
        rank, num_workers: of teams, where several workers share each sample.
    """

    rank: int
    num_workers: int
    pad_token_id: int


def is_same_head(stage: Stage, options: dict[str, Any], main: Stage, main_options: dict[str, Any]) -> bool:
    """Whether a stage says the same of a trunk as the main one: then they share all, head included.

    Args:
        stage, main: as asked.
        options, main_options: their tasks' `model_options`.
    """
    is_alike = (stage.task, stage.head.kind) == (main.task, main.head.kind)
    return is_alike and options == main_options and main.head.start != "new"


class Part:
    """A stage, its task and its data."""

    def __init__(self, asked: Stage, plan: StagePlan, facts: StageFacts, tokenizer: Any, seat: Seat) -> None:
        self.asked, self.plan, self.facts, self.seat = asked, plan, facts, seat
        self.stores = [Store(Path(path)) for path in facts.train.stores]
        self.task = tasks.create(asked)
        self.task.columns(self.stores[0].manifest.columns)
        self.task.set_tokenizer(tokenizer, plan.max_length)

    @property
    def name(self) -> str:
        """The stage's; the baseline has one of its own."""
        return self.plan.name

    @property
    def fingerprint(self) -> str:
        """Of the data and of how it is batched: what a position means."""
        return f"{self.facts.train.fingerprint}/{self.plan.kind}/{self.plan.units_per_step}"

    @property
    def content(self) -> str:
        """A hash of all tokens to train on; empty while some are still being made."""
        metas = [store.meta for store in self.stores]
        return "" if None in metas else "/".join(meta["content"] for meta in metas if meta)

    @cached_property
    def batches(self) -> feed.Feed:
        """The training batches of this rank."""
        batching = feed.Batching(
            kind=self.plan.kind,
            by_tokens=self.task.loss_unit == "token",
            units_per_step=self.plan.units_per_step,
            micro_batch=self.plan.micro_batch,
            budget_tokens=self.plan.budget_tokens,
        )
        return feed.Feed(
            self.stores,
            list(self.facts.train.weights),
            batching,
            fingerprint=self.facts.train.fingerprint,
            seed=self.asked.seed,
            num_workers=self.seat.num_workers,
            rank=self.seat.rank,
            pad_token_id=self.seat.pad_token_id,
        )

    def eval_batches(
        self, only: Integers | None = None, budget_tokens: int | None = None
    ) -> Iterator[feed.MicroBatch]:
        """Return this rank's share of the eval split.

        Args:
            only: the ids of the samples that are wanted; None: all.
            budget_tokens: of a micro-batch; None: as in training.
        """
        return feed.eval_batches(
            self._eval_stores,
            micro_batch=self.plan.micro_batch,
            budget_tokens=budget_tokens or self.plan.budget_tokens,
            num_workers=self.seat.num_workers,
            rank=self.seat.rank,
            pad_token_id=self.seat.pad_token_id,
            grouped=self.task.is_grouped,
            only=only,
        )

    def drawn(self, most_rows: int, most_tokens: int, *, fewest_rows: int) -> tuple[Integers, int]:
        """Draw rows of the eval split, the same on every rank; see `Split.drawn`."""
        split = Split(self._eval_stores)
        return split.drawn(most_rows, most_tokens, fewest_rows=fewest_rows, grouped=self.task.is_grouped)

    @property
    def _eval_stores(self) -> list[Store]:
        assert self.facts.eval is not None
        return [Store(Path(path)) for path in self.facts.eval.stores]

    def probe_batch(self) -> feed.MicroBatch:
        """The first few samples, the same on every rank."""
        split = Split([Store(Path(path)) for path in (self.facts.eval or self.facts.train).stores])
        samples = split.first_samples(PROBE_SAMPLES)
        return feed.collate(split, samples, pad_token_id=self.seat.pad_token_id)


def in_lock_step(parts: list[Part], step: int) -> tuple[feed.StepBatch, ...]:
    """Return all parts' batches of a step, with as many micro-batches in each: fillers weigh nothing."""
    batches = [part.batches.step(step) for part in parts]
    most = max(len(batch.micro_batches) for batch in batches)
    return tuple(
        replace(batch, micro_batches=[*batch.micro_batches, *_fillers(batch, most)]) for batch in batches
    )


def _fillers(batch: feed.StepBatch, most: int) -> list[feed.MicroBatch]:
    last = batch.micro_batches[-1]
    features = {name: values[:1] for name, values in last.features.items()}
    features["labels"] = np.full_like(features["labels"], feed.IGNORED)
    filler = feed.MicroBatch(features, last.chunk, np.empty(0, dtype=np.int64))
    return [filler] * (most - len(batch.micro_batches))
