"""The batches of one rank: what it trains on at each step, and its share of an evaluation.

Nothing is remembered between steps: a step's number is the whole state, so resuming at a step, on any
number of workers, means asking for that step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launcher.data.order import Integers, Mixture, Order
from launcher.data.pack import STEPS_PER_POOL, deal, rounds, steps_of_pool
from launcher.data.split import Split
from launcher.data.store import INPUT_IDS, Array, Store

IGNORED = -100
_MASK = "target_mask"
_SPAN = 4096


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the model sees at once.

    Attributes:
        features: int64. Sequences are padded, of shape (rows, longest): input_ids, the task's own, and
            attention_mask or, for packs, position_ids, which restart with each sample; what is one
            number for each sample is of shape (rows,).
        chunk: index among the chunks of the step, over all workers.
        samples: int64: the ids of the samples; empty for padding, which must weigh nothing.
    """

    features: dict[str, Integers]
    chunk: int
    samples: Integers

    @property
    def rows(self) -> Integers:
        """The ids of the samples that a row each begins with: of all, but where several are judged together."""
        windows = self.features.get("_window")
        return self.samples if windows is None or not len(self.samples) else self.samples[windows == 0]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step: the counts are of the global batch, the micro-batches are this rank's.

    Attributes:
        epoch: from 0.
        num_slots: tokens and padding that all ranks' micro-batches have room for.
    """

    step: int
    epoch: int
    num_targets: int
    num_tokens: int
    num_slots: int
    num_samples: int
    micro_batches: list[MicroBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How the units of the order become steps and micro-batches.

    Attributes:
        kind: `random`: units as the order gives them; `bucketed`: of like length; `packed`: units are
            packs.
        by_tokens: bucketed: steps have the same number of tokens, and `units_per_step` on average.
        units_per_step: samples or packs of an optimizer step.
        micro_batch: samples or packs that one worker runs at a time, where there is no budget.
        budget_tokens: padded tokens of a micro-batch, at most; or None.
    """

    kind: Literal["random", "bucketed", "packed"]
    by_tokens: bool
    units_per_step: int
    micro_batch: int
    budget_tokens: int | None


class Feed:
    """The training batches of one rank."""

    def __init__(
        self,
        stores: list[Store],
        weights: list[float],
        batching: Batching,
        *,
        fingerprint: str,
        seed: int,
        num_workers: int,
        rank: int,
        pad_token_id: int,
    ) -> None:
        self.batching = batching
        self._key = f"{fingerprint}/{seed}"
        self._packed = batching.kind == "packed"
        self._split = Split(stores, packed=self._packed)
        orders = [self._order(store, seed) for store in stores]
        self._order_of_all = Mixture(orders, weights, fingerprint=fingerprint, seed=seed)
        self._are_sizes_known = all(order.are_counts_known for order in orders)
        self._num_workers, self._rank, self._pad_token_id = num_workers, rank, pad_token_id
        self._pool: tuple[tuple[int, int], list[Integers]] | None = None
        self._span: tuple[int, int, int, Integers] | None = None

    def _order(self, store: Store, seed: int) -> Order:
        return Order(
            store.num_blocks,
            lambda blocks: store.num_units(blocks, packed=self._packed),
            fingerprint=store.manifest.fingerprint,
            seed=seed,
            are_counts_known=store.meta is not None or (store.is_settled and not self._packed),
        )

    def step(self, step: int) -> StepBatch:
        """Return what this rank does at a step, counted from 1.

        All ranks have the same number of micro-batches.
        """
        epoch, number = self._locate(step - 1)
        samples, rows = self._samples(epoch, number)
        lengths, widths = self._split.lengths(samples), self._split.widths(samples)
        # The tokens of each row, and what it is padded by: a row is a sample, or a pack of several.
        row_lengths, row_widths = (
            np.bincount(rows, weights=each).astype(np.int64) if len(rows) else each
            for each in (lengths, widths)
        )
        batching = self.batching
        num_rounds = rounds(
            row_widths,
            num_workers=self._num_workers,
            micro_batch=batching.micro_batch,
            budget_tokens=batching.budget_tokens,
        )
        chunks = deal(row_widths, num_rounds * self._num_workers, budget_tokens=batching.budget_tokens)
        # A step all of whose rows were skipped still needs something to run, at weight zero.
        shortest = samples[[np.argmin(lengths)]] if len(samples) else self._split.first_samples(1)
        stand_in_length = int(self._split.lengths(shortest)[0])
        slots = sum(len(c) * int(row_lengths[c].max()) if len(c) else stand_in_length for c in chunks)
        firsts = np.searchsorted(rows, np.arange(len(row_lengths) + 1))
        micro_batches = []
        for chunk in range(self._rank, len(chunks), self._num_workers):
            pieces = [samples[firsts[row] : firsts[row + 1]] for row in chunks[chunk]]
            micro_batches.append(self._micro_batch(pieces, chunk, shortest))
        return StepBatch(
            step=step,
            epoch=epoch,
            num_targets=int(self._split.targets(samples).sum()),
            num_tokens=int(lengths.sum()),
            num_slots=int(slots),
            num_samples=len(samples),
            micro_batches=micro_batches,
        )

    def _locate(self, done: int) -> tuple[int, int]:
        """Return (epoch, step in the epoch, from 0) after `done` steps."""
        per_step = self.batching.units_per_step
        if not self._are_sizes_known and self._order_of_all.has(0, done * per_step):
            return 0, done
        self._are_sizes_known = True
        epoch, number = divmod(done, max(1, -(-self._order_of_all.num_units // per_step)))
        return epoch, number

    def _samples(self, epoch: int, number: int) -> tuple[Integers, Integers]:
        """Return the samples of a step, and the row (sample or pack) that each belongs to."""
        per_step = self.batching.units_per_step
        if self.batching.kind != "bucketed":
            last = self._last(epoch, (number + 1) * per_step)
            return self._rows(epoch, number * per_step, last)
        pool, place = divmod(number, STEPS_PER_POOL)
        if self._pool is None or self._pool[0] != (epoch, pool):
            self._pool = (epoch, pool), self._steps_of_pool(epoch, pool)
        steps = self._pool[1]
        return steps[place], np.arange(len(steps[place]), dtype=np.int64)

    def _steps_of_pool(self, epoch: int, pool: int) -> list[Integers]:
        per_step = self.batching.units_per_step
        per_pool = per_step * STEPS_PER_POOL
        last = self._last(epoch, (pool + 1) * per_pool)
        samples, _ = self._rows(epoch, pool * per_pool, last)
        steps = steps_of_pool(
            self._split.widths(samples),
            num_steps=-(-(last - pool * per_pool) // per_step),
            samples_per_step=per_step,
            by_tokens=self.batching.by_tokens,
            key=f"{self._key}/{epoch}/pool/{pool}",
        )
        return [samples[step] for step in steps]

    def _last(self, epoch: int, place: int) -> int:
        """Return `place`, or where the epoch ends before it."""
        order = self._order_of_all
        return place if order.has(epoch, place - 1) else order.num_units

    def _rows(self, epoch: int, first: int, last: int) -> tuple[Integers, Integers]:
        samples, owners = self._split.samples_of(self._units(epoch, first, last))
        # Units without a sample leave no row.
        return samples, np.unique(owners, return_inverse=True)[1].astype(np.int64)

    def _units(self, epoch: int, first: int, last: int) -> Integers:
        if not self._are_sizes_known:
            return self._order_of_all.units_at(epoch, np.arange(first, last, dtype=np.int64))
        # A permutation costs the same for a few places as for many.
        if (
            self._span is None
            or self._span[0] != epoch
            or not self._span[1] <= first <= last <= self._span[2]
        ):
            until = min(max(last, first + _SPAN), self._order_of_all.num_units)
            units = self._order_of_all.units_at(epoch, np.arange(first, until, dtype=np.int64))
            self._span = epoch, first, until, units
        begin, units = self._span[1], self._span[3]
        return units[first - begin : last - begin]

    def _micro_batch(self, pieces: list[Integers], chunk: int, stand_in: Integers) -> MicroBatch:
        if not pieces:
            return _weightless(self._split, stand_in, chunk, self._pad_token_id, packed=self._packed)
        samples = np.concatenate(pieces)
        if self._packed:
            return MicroBatch(_packs(self._split, pieces, self._pad_token_id), chunk, samples)
        return MicroBatch(_padded(self._split, samples, self._pad_token_id), chunk, samples)


class Steps:
    """Batches made by one thread, ahead of their use."""

    def __init__(self, make: Callable[[int], StepBatch], start: int, last: int, *, ahead: int = 2) -> None:
        """Begin.

        Args:
            make: returns the batch of a step.
            start: the first step.
            last: the last one.
            ahead: batches to have ready.
        """
        self._make, self._last, self._ahead = make, last, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._pending: dict[int, Future[StepBatch]] = {}
        self._submit(start)

    def __call__(self, step: int) -> StepBatch:
        """Return the batch of a step; the following ones are begun."""
        self._submit(step)
        return self._pending.pop(step).result()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> None:
        for wanted in range(step, min(step + self._ahead, self._last) + 1):
            if wanted not in self._pending:
                self._pending[wanted] = self._thread.submit(self._make, wanted)


def eval_batches(
    stores: list[Store],
    *,
    micro_batch: int,
    budget_tokens: int | None,
    num_workers: int,
    rank: int,
    pad_token_id: int,
    grouped: bool = False,
    only: Integers | None = None,
) -> Iterator[MicroBatch]:
    """Yield this rank's share of a split: every sample exactly once over all ranks, longest first.

    Args:
        stores: the split's data sets.
        micro_batch: samples of a micro-batch, at most, where `budget_tokens` is None.
        budget_tokens: padded tokens of a micro-batch, at most.
        num_workers: ranks that share the split; all get the same number of micro-batches, so that none
            waits in a collective for another. Padding ones, without samples, fill up.
        rank: this one.
        pad_token_id: fills input_ids.
        grouped: keep samples of one row, which follow each other with equal `_row`, in one micro-batch,
            even where they exceed its limit. Then rows are in the order of their longest sample.
        only: the ids of the samples that are wanted, all of a row where rows are grouped, in the order of the
            files; None: all.
    """
    split = Split(stores)
    samples = split.all_samples() if only is None else only
    if not len(samples):
        return
    firsts = split.firsts_of_rows(samples) if grouped else np.arange(len(samples))
    samples, bounds = _longest_first(split, samples, firsts, micro_batch, budget_tokens)
    num_chunks = -(-(len(bounds) - 1) // num_workers) * num_workers
    for chunk in range(rank, num_chunks, num_workers):
        if chunk + 1 < len(bounds):
            yield collate(split, samples[bounds[chunk] : bounds[chunk + 1]], chunk, pad_token_id=pad_token_id)
        else:
            yield _weightless(split, samples[-1:], chunk, pad_token_id, packed=False)


def _longest_first(
    split: Split, samples: Integers, firsts: Integers, micro_batch: int, budget_tokens: int | None
) -> tuple[Integers, list[int]]:
    """Sort groups of samples by their longest, and cut between groups.

    Args:
        split: the samples' split.
        samples: the samples, group after group.
        firsts: the place of each group's first sample.
        micro_batch, budget_tokens: as of `eval_batches`; a group by itself may exceed them.

    Returns:
        The samples in their new order, and the places where micro-batches begin, and the end.
    """
    longest = np.maximum.reduceat(split.widths(samples), firsts)
    order = np.argsort(-longest, kind="stable")
    sizes = np.diff(firsts, append=len(samples))[order]
    ends = np.cumsum(sizes)
    places = np.repeat(firsts[order] - ends + sizes, sizes) + np.arange(len(samples))
    bounds, group = [0], 0
    while group < len(order):
        width = max(1, int(longest[order[group]]))
        most = micro_batch if budget_tokens is None else budget_tokens // width
        group = max(group + 1, int(np.searchsorted(ends, bounds[-1] + most, side="right")))
        bounds.append(int(ends[group - 1]))
    return samples[places], bounds


def collate(split: Split, samples: Integers, chunk: int = 0, *, pad_token_id: int) -> MicroBatch:
    """Return samples as one micro-batch, outside any step."""
    return MicroBatch(_padded(split, samples, pad_token_id), chunk, samples)


def _weightless(
    split: Split, stand_in: Integers, chunk: int, pad_token_id: int, *, packed: bool
) -> MicroBatch:
    # Ranks meet in collectives, so one without samples runs the cheapest one there is, without labels.
    make = _packs(split, [stand_in], pad_token_id) if packed else _padded(split, stand_in, pad_token_id)
    make["labels"] = np.full_like(make.get("labels", make[INPUT_IDS]), IGNORED)
    return MicroBatch(make, chunk, np.empty(0, dtype=np.int64))


def _padded(split: Split, samples: Integers, pad_token_id: int) -> dict[str, Integers]:
    fills = {INPUT_IDS: pad_token_id, "labels": IGNORED}
    features: dict[str, Integers] = split.scalars(samples)
    ragged = split.ragged(samples)
    for name, sequences in ragged.items():
        features[name] = _rectangle(sequences, fills.get(name, 0))
    if _MASK in features:
        features["labels"] = np.where(features.pop(_MASK), features[INPUT_IDS], IGNORED)
    lengths = np.array([len(sequence) for sequence in ragged[INPUT_IDS]])
    columns = np.arange(features[INPUT_IDS].shape[1])
    features["attention_mask"] = (columns < lengths[:, None]).astype(np.int64)
    return features


def _packs(split: Split, pieces: list[Integers], pad_token_id: int) -> dict[str, Integers]:
    """Lay the samples of each piece one after another in a row."""
    ragged = split.ragged(np.concatenate(pieces))
    lengths = np.array([len(sequence) for sequence in ragged[INPUT_IDS]])
    sizes = [len(piece) for piece in pieces]
    ends = np.cumsum(lengths)
    row_ends = ends[np.cumsum(sizes) - 1]
    row_starts = np.concatenate([[0], row_ends[:-1]])
    row_lengths = row_ends - row_starts
    columns = np.arange(int(row_lengths.max()))
    inside = columns < row_lengths[:, None]
    features: dict[str, Integers] = {}
    for name, sequences in ragged.items():
        features[name] = np.full(inside.shape, pad_token_id if name == INPUT_IDS else 0, dtype=np.int64)
        features[name][inside] = np.concatenate(sequences)
    # Padding goes on as one more segment, so positions restart there too.
    positions = columns - np.where(inside, 0, row_lengths[:, None])
    positions[inside] = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    labels = np.where(features.pop(_MASK), features[INPUT_IDS], IGNORED)
    # Nothing predicts the first token of a sample: what stands before it is another's.
    labels[positions == 0] = IGNORED
    features["position_ids"], features["labels"] = positions, labels
    return features


def _rectangle(sequences: list[Array], fill: int) -> Integers:
    longest = max(len(sequence) for sequence in sequences)
    padded = np.full((len(sequences), longest), fill, dtype=np.int64)
    # One copy a row: the samples of a micro-batch lie in many blocks.
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded
