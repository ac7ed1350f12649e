"""One rank's batches. The state of a feed is one integer, the step; nothing is read to reach it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.order import Integers, samples_at
from launcher.data.pack import deal
from launcher.data.store import Split

IGNORED = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a rank runs at a time.

    Attributes:
        features: int64 arrays of shape (samples, longest), or (samples,) for scalar features.
        chunk: the index among the chunks of the step, the same for any number of workers.
        samples: int64 ids; empty for a padding micro-batch of weight zero.
    """

    features: dict[str, npt.NDArray[np.int64]]
    chunk: int
    samples: Integers


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step: counts over the global batch, and this rank's micro-batches."""

    step: int
    positions: range
    num_targets: int
    num_tokens: int
    num_samples: int
    micro_batches: list[MicroBatch]


class Feed:
    """Gives the batches of any step."""

    def __init__(
        self,
        split: Split,
        *,
        fingerprint: str,
        seed: int,
        num_positions: int,
        samples_per_step: int,
        accumulation: int,
        num_workers: int,
        rank: int,
        pad_token_id: int,
    ) -> None:
        self.split, self.fingerprint, self.seed = split, fingerprint, seed
        self.num_positions, self.samples_per_step = num_positions, samples_per_step
        self.num_chunks, self.num_workers, self.rank = accumulation * num_workers, num_workers, rank
        self.pad_token_id = pad_token_id

    def step(self, step: int) -> StepBatch:
        """Return this rank's part of step `step` (from 1)."""
        start = (step - 1) * self.samples_per_step
        positions = range(start, min(start + self.samples_per_step, self.num_positions))
        samples = samples_at(
            np.arange(positions.start, positions.stop, dtype=np.int64),
            num_samples=self.split.num_samples,
            fingerprint=self.fingerprint,
            seed=self.seed,
        )
        lengths = self.split.lengths[samples]
        chunks = deal(lengths, self.num_chunks)
        mine = [
            self._micro_batch(c, samples[chunk], samples[np.argmin(lengths)])
            for c, chunk in enumerate(chunks)
            if c % self.num_workers == self.rank
        ]
        targets = int(self.split.num_targets[samples].sum())
        return StepBatch(step, positions, targets, int(lengths.sum()), len(samples), mine)

    def _micro_batch(self, chunk: int, samples: Integers, spare: int) -> MicroBatch:
        if len(samples):
            return collate(self.split, samples, chunk=chunk, pad_token_id=self.pad_token_id)
        return _weightless(self.split, int(spare), chunk, self.pad_token_id)


def eval_batches(
    split: Split, *, micro_batch: int, num_workers: int, rank: int, pad_token_id: int
) -> Iterator[MicroBatch]:
    """Yield this rank's batches of an evaluation.

    Over all ranks every sample comes exactly once; all ranks get the same number of batches, filled up
    with batches of weight zero, so that collectives match.
    """
    longest_first = np.argsort(-split.lengths, kind="stable")
    num_rounds = math.ceil(split.num_samples / (micro_batch * num_workers))
    for number in range(num_rounds):
        chunk = number * num_workers + rank
        samples = longest_first[chunk * micro_batch : (chunk + 1) * micro_batch]
        if len(samples):
            yield collate(split, samples, chunk=chunk, pad_token_id=pad_token_id)
        else:
            yield _weightless(split, int(longest_first[-1]), chunk, pad_token_id)


def collate(split: Split, samples: Integers, *, chunk: int, pad_token_id: int) -> MicroBatch:
    """Pad samples to the longest of them; padding bears no attention and no loss."""
    taken = split.take(samples)
    lengths = split.lengths[samples]
    inside = np.arange(int(lengths.max())) < lengths[:, None]
    features: dict[str, Any] = {"attention_mask": inside.astype(np.int64)}
    for name in split.ragged:
        pad = {"input_ids": pad_token_id, "labels": IGNORED}.get(name, 0)
        features[name] = np.full(inside.shape, pad, dtype=np.int64)
        features[name][inside] = np.concatenate(taken[name])
    for name in split.scalars:
        if name != "num_targets":
            features[name] = taken[name].astype(np.int64)
    return MicroBatch(features, chunk, np.asarray(samples, dtype=np.int64))


def _weightless(split: Split, sample: int, chunk: int, pad_token_id: int) -> MicroBatch:
    filler = collate(split, np.array([sample], dtype=np.int64), chunk=chunk, pad_token_id=pad_token_id)
    labels = np.full_like(filler.features["labels"], IGNORED)
    return MicroBatch(filler.features | {"labels": labels}, chunk, np.empty(0, dtype=np.int64))
