"""The samples of a split, over all its data sets and blocks: found by their ids, read from mapped memory."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from launcher.data.order import Integers, parts_of, permute, round_keys, unit_ids
from launcher.data.store import Array, Block, Store


class Split:
    """A split's data sets, one store each.

    Units (what the order deals) are samples, or packs of samples; both are named by `order.unit_ids`.
    """

    def __init__(self, stores: Sequence[Store], *, packed: bool = False) -> None:
        self.stores, self.packed = list(stores), packed

    def samples_of(self, units: Integers) -> tuple[Integers, Integers]:
        """Return the samples of some units.

        A unit may have none: a row from which the preparation made no sample keeps its place.

        Returns:
            int64 ids of the samples, unit after unit; and of the same shape, for each sample, the index
            of its unit in `units`.
        """
        if not self.packed:
            there = np.zeros(len(units), dtype=bool)
            for block, _, rows, here in self._by_block(units):
                there[here] = rows < len(block.lengths)
            return units[there], np.flatnonzero(there)
        samples: list[Integers] = []
        owners: list[Integers] = []
        for block, base, packs, here in self._by_block(units):
            members, starts = block.packs()
            sizes = starts[packs + 1] - starts[packs]
            firsts = np.repeat(starts[packs] - np.cumsum(sizes) + sizes, sizes)
            samples.append(base | members[firsts + np.arange(sizes.sum())])
            owners.append(np.repeat(here, sizes))
        if not samples:
            return units, units
        owner = np.concatenate(owners)
        by_unit = np.argsort(owner, kind="stable")
        return np.concatenate(samples)[by_unit], owner[by_unit]

    def lengths(self, samples: Integers) -> Integers:
        """Return the tokens of each sample."""
        return self._of_each(samples, lambda block: block.lengths)

    def widths(self, samples: Integers) -> Integers:
        """Return the tokens of each sample's longest sequence: where the answer is one of its own, it may be that."""
        return self._of_each(samples, lambda block: block.widths)

    def targets(self, samples: Integers) -> Integers:
        """Return the labels or tokens of each sample that bear loss."""
        return self._of_each(samples, lambda block: block.targets)

    def _of_each(self, samples: Integers, of: Callable[[Block], Integers]) -> Integers:
        values = np.empty(len(samples), dtype=np.int64)
        for block, _, rows, here in self._by_block(samples):
            values[here] = of(block)[rows]
        return values

    def scalars(self, samples: Integers) -> dict[str, Array]:
        """Return by name the task's features that are one integer for each sample."""
        found: dict[str, Array] = {}
        for block, _, rows, here in self._by_block(samples):
            if not block.features:
                break  # A task's blocks all have the same features.
            for name, values in block.features.items():
                found.setdefault(name, np.empty(len(samples), dtype=np.int64))[here] = values[rows]
        return found

    def ragged(self, samples: Integers) -> dict[str, list[Array]]:
        """Return by name the features that are a sequence for each sample: views, nothing is copied."""
        found: dict[str, list[Array]] = {}
        sets, blocks, rows = (part.tolist() for part in parts_of(samples))
        for data_set, block, row in zip(sets, blocks, rows, strict=True):
            for name, (values, offsets) in self.stores[data_set].block(block).ragged.items():
                found.setdefault(name, []).append(values[offsets[row] : offsets[row + 1]])
        return found

    def all_samples(self) -> Integers:
        """Return the ids of all samples in the order of the files; for a split that is read whole."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._samples_by_block()])

    def first_samples(self, count: int) -> Integers:
        """Return the ids of the first samples; opens no more blocks than hold them."""
        found = np.empty(0, dtype=np.int64)
        for ids in self._samples_by_block():
            found = np.concatenate([found, ids[: count - len(found)]])
            if len(found) == count:
                break
        return found

    def firsts_of_rows(self, samples: Integers) -> Integers:
        """Return the place in `samples`, which are in the order of the files, of each row's first one.

        Only where the task tells rows apart: samples of one have equal `_row`.
        """
        rows, (sets, blocks, _) = self.scalars(samples)["_row"], parts_of(samples)
        is_new = (np.diff(rows) != 0) | (np.diff(sets) != 0) | (np.diff(blocks) != 0)
        return np.concatenate([[0], np.flatnonzero(is_new) + 1])

    def drawn(
        self, most_rows: int, most_tokens: int, *, fewest_rows: int, grouped: bool
    ) -> tuple[Integers, int]:
        """Draw rows from all over the split: the same ones wherever it is asked.

        Args:
            most_rows: draw so many, if there are.
            most_tokens: draw fewer, if they have more tokens together.
            fewest_rows: but at least these.
            grouped: rows may have several samples, as of `firsts_of_rows`.

        Returns:
            The ids of their samples in the order of the files; and the number of rows of the whole split.
        """
        samples = self.all_samples()
        if not len(samples):
            return samples, 0
        firsts = self.firsts_of_rows(samples) if grouped else np.arange(len(samples))
        ends, size = np.append(firsts, len(samples))[1:], len(firsts)
        # Not evenly spaced: files often repeat themselves.
        rows = permute(np.arange(min(most_rows, size)), size, round_keys("drawn"))
        pieces = [samples[firsts[row] : ends[row]] for row in rows]
        tokens = np.cumsum([int(self.lengths(piece).sum()) for piece in pieces])
        count = max(fewest_rows, int(np.searchsorted(tokens, most_tokens, side="right")))
        return np.sort(np.concatenate(pieces[:count])), size

    def _samples_by_block(self) -> Iterator[Integers]:
        for i, store in enumerate(self.stores):
            for index in range(store.num_blocks):
                rows = np.arange(len(store.block(index).lengths), dtype=np.int64)
                yield unit_ids(i, np.full_like(rows, index), rows)

    def _by_block(self, ids: Integers) -> Iterator[tuple[Block, np.int64, Integers, Integers]]:
        """Yield (block, what the ids of its rows begin with, rows asked for, their places in `ids`)."""
        sets, blocks, rows = parts_of(ids)
        owners = ids - rows
        by_owner = np.argsort(owners, kind="stable")
        for here in np.split(by_owner, np.flatnonzero(np.diff(owners[by_owner])) + 1):
            if len(here):
                block = self.stores[int(sets[here[0]])].block(int(blocks[here[0]]))
                yield block, owners[here[0]], rows[here], here
