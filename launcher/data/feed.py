"""The batches of one rank: what it trains on at each step, and its share of an evaluation.

Nothing is remembered between steps: a step's number is the whole state, so resuming at a step, on any
number of workers, means asking for that step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from launcher.data.order import Integers, samples_at
from launcher.data.pack import deal
from launcher.data.store import Int32s, Split

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the model sees at once.

    Attributes:
        features: int64. Sequences are padded, of shape (samples, longest): input_ids, attention_mask and
            the task's own; what is one number for each sample is of shape (samples,).
        chunk: index among the chunks of the step, the same for any number of workers.
        samples: int64 of shape (samples,): their ids; empty for padding, which must weigh nothing.
    """

    features: dict[str, Integers]
    chunk: int
    samples: Integers


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step: the counts are of the global batch, the micro-batches are this rank's."""

    step: int
    positions: range
    num_targets: int
    num_tokens: int
    num_samples: int
    micro_batches: list[MicroBatch]


class Feed:
    """The training batches of one rank."""

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
        self._split = split
        self._fingerprint = fingerprint
        self._seed = seed
        self._num_positions = num_positions
        self._samples_per_step = samples_per_step
        self._num_chunks = accumulation * num_workers
        self._num_workers = num_workers
        self._rank = rank
        self._pad_token_id = pad_token_id

    def step(self, step: int) -> StepBatch:
        """Return what this rank does at a step, counted from 1; always `accumulation` micro-batches."""
        positions = self._positions(step)
        samples = samples_at(
            np.arange(positions.start, positions.stop, dtype=np.int64),
            num_samples=self._split.num_samples,
            fingerprint=self._fingerprint,
            seed=self._seed,
        )
        lengths = self._split.lengths[samples]
        shortest = samples[np.argmin(lengths)]
        chunks = deal(lengths, self._num_chunks)
        return StepBatch(
            step=step,
            positions=positions,
            num_targets=int(self._split.num_targets[samples].sum()),
            num_tokens=int(lengths.sum()),
            num_samples=len(samples),
            micro_batches=[
                _micro_batch(self._split, samples[chunks[chunk]], chunk, shortest, self._pad_token_id)
                for chunk in range(self._rank, self._num_chunks, self._num_workers)
            ],
        )

    def _positions(self, step: int) -> range:
        first = (step - 1) * self._samples_per_step
        if not 0 <= first < self._num_positions:
            raise IndexError(f"step {step} is outside the {self._num_positions} positions of the run")
        return range(first, min(first + self._samples_per_step, self._num_positions))


def eval_batches(
    split: Split, *, micro_batch: int, num_workers: int, rank: int, pad_token_id: int
) -> Iterator[MicroBatch]:
    """Yield this rank's share of a split: every sample exactly once over all ranks, longest first.

    Args:
        split: what to evaluate on.
        micro_batch: samples of a micro-batch, at most.
        num_workers: ranks that share the split; all get the same number of micro-batches, so that none
            waits in a collective for another. Padding ones, without samples, fill up.
        rank: this one.
        pad_token_id: fills input_ids.
    """
    longest_first = np.argsort(-split.lengths, kind="stable")
    num_chunks = -(-split.num_samples // (micro_batch * num_workers)) * num_workers
    for chunk in range(rank, num_chunks, num_workers):
        samples = longest_first[chunk * micro_batch : (chunk + 1) * micro_batch]
        yield _micro_batch(split, samples, chunk, longest_first[-1], pad_token_id)


def collate(split: Split, samples: Integers, *, pad_token_id: int) -> MicroBatch:
    """Return samples as one micro-batch, outside any step."""
    return MicroBatch(_padded(split, samples, pad_token_id), 0, samples)


def _micro_batch(
    split: Split, samples: Integers, chunk: int, stand_in: np.int64, pad_token_id: int
) -> MicroBatch:
    if len(samples):
        return MicroBatch(_padded(split, samples, pad_token_id), chunk, samples)
    # Ranks meet in collectives, so one without samples runs the cheapest one there is, without labels.
    features = _padded(split, np.array([stand_in], dtype=np.int64), pad_token_id)
    features["labels"] = np.full_like(features.get("labels", features["input_ids"]), _IGNORED)
    return MicroBatch(features, chunk, samples)


def _padded(split: Split, samples: Integers, pad_token_id: int) -> dict[str, Integers]:
    taken = split.take(samples)
    del taken["num_targets"]
    fills = {"input_ids": pad_token_id, "labels": _IGNORED}
    features = {
        name: _rectangle(values, fills.get(name, 0)) if isinstance(values, list) else values
        for name, values in taken.items()
    }
    columns = np.arange(features["input_ids"].shape[1])
    features["attention_mask"] = (columns < split.lengths[samples][:, None]).astype(np.int64)
    return features


def _rectangle(sequences: list[Int32s], fill: int) -> Integers:
    longest = max(len(sequence) for sequence in sequences)
    padded = np.full((len(sequences), longest), fill, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded
