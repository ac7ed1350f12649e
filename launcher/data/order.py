"""Which sample when: the global order as a pure function of (data fingerprint, seed, epoch).

A data set is a row of blocks (the token store's files). The order of an epoch is a keyed permutation of
the blocks, cut into windows of consecutive blocks, and a keyed permutation of the units inside each
window. So a rank holds a window's blocks open and no list of all samples, any place is found by
arithmetic, and training can begin when the first window's blocks exist.

A unit is what the order deals: a sample, or a pack of samples. It is named by one int64: data set,
block and row in the block (`unit_ids`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

BLOCKS_PER_WINDOW = 16
UNITS_PER_PATTERN = 1024

_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_ROW_BITS, _BLOCK_BITS = 32, 24


def unit_ids(data_set: int, blocks: Integers, rows: Integers) -> Integers:
    """Return the ids of units: 7 bits of data set, 24 of block, 32 of row."""
    return (np.int64(data_set) << (_BLOCK_BITS + _ROW_BITS)) | (blocks << _ROW_BITS) | rows


def parts_of(ids: Integers) -> tuple[Integers, Integers, Integers]:
    """Return (data sets, blocks, rows) of unit ids."""
    blocks = (ids >> _ROW_BITS) & ((1 << _BLOCK_BITS) - 1)
    return ids >> (_BLOCK_BITS + _ROW_BITS), blocks, ids & ((1 << _ROW_BITS) - 1)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One epoch of a data set, as far as it is known.

    Attributes:
        blocks: the blocks in the order of this epoch.
        starts: place of the first unit of each block, then one past the last unit known.
    """

    number: int
    blocks: Integers
    starts: Integers


def blocks_at(places: Integers, num_blocks: int, *, fingerprint: str, seed: int, epoch: int) -> Integers:
    """Return the blocks at some places of an epoch: the order in which it goes through a data set."""
    return permute(places, num_blocks, round_keys(f"{fingerprint}/{seed}/{epoch}"))


class Order:
    """The order of one data set."""

    def __init__(
        self,
        num_blocks: int,
        count_of: Callable[[Integers], Integers],
        *,
        fingerprint: str,
        seed: int,
        are_counts_known: bool = True,
        blocks_per_window: int = BLOCKS_PER_WINDOW,
    ) -> None:
        """Describe a data set.

        Args:
            num_blocks: blocks of the data set.
            count_of: the number of units in each of some blocks. Where a block is still being made,
                it waits.
            fingerprint: of the data and its preparation; other data, another order.
            seed: the stage's.
            are_counts_known: whether `count_of` answers for all blocks without waiting. If not, only
                as many blocks are asked for as a place needs.
            blocks_per_window: blocks whose units are mixed with each other.
        """
        self.num_blocks, self.count_of = num_blocks, count_of
        self.are_counts_known = are_counts_known
        self._fingerprint, self._seed = fingerprint, seed
        self._blocks_per_window = blocks_per_window
        self._epoch: _Epoch | None = None
        self._total: int | None = None

    @property
    def num_units(self) -> int:
        """Units of one epoch; waits for all blocks where they are still being made."""
        if self._total is None:
            self._total = int(self.count_of(np.arange(self.num_blocks, dtype=np.int64)).sum())
            self.are_counts_known = True
        return self._total

    def has(self, epoch: int, place: int) -> bool:
        """Tell whether an epoch has so many units, waiting for no more blocks than that takes."""
        if self.are_counts_known:
            return place < self.num_units
        return place < int(self._known(epoch, place).starts[-1])

    def blocks_of_window(self, epoch: int, window: int) -> Integers:
        """Return the blocks of a window, in the order of the epoch."""
        first = window * self._blocks_per_window
        places = np.arange(first, min(first + self._blocks_per_window, self.num_blocks), dtype=np.int64)
        return self._blocks_at(places, epoch)

    def _blocks_at(self, places: Integers, epoch: int) -> Integers:
        return blocks_at(places, self.num_blocks, fingerprint=self._fingerprint, seed=self._seed, epoch=epoch)

    def units_at(self, epoch: int, places: Integers) -> tuple[Integers, Integers]:
        """Return (blocks, rows) of the units at some places of an epoch.

        Args:
            epoch: from 0.
            places: int64 of shape (n,), each below the epoch's units.
        """
        if not len(places):
            return places, places
        known = self._known(epoch, int(places.max()))
        window_starts = known.starts[:: self._blocks_per_window]
        windows = np.searchsorted(known.starts, places, side="right") - 1
        windows //= self._blocks_per_window
        shuffled = np.empty_like(places)
        for window in np.unique(windows):
            here = windows == window
            first = int(window_starts[window])
            last_block = min((int(window) + 1) * self._blocks_per_window, len(known.starts) - 1)
            size = int(known.starts[last_block]) - first
            keys = round_keys(f"{self._fingerprint}/{self._seed}/{epoch}/{window}")
            shuffled[here] = first + permute(places[here] - first, size, keys)
        owners = np.searchsorted(known.starts, shuffled, side="right") - 1
        return known.blocks[owners], shuffled - known.starts[owners]

    def _known(self, epoch: int, place: int) -> _Epoch:
        """Return the epoch's blocks, at least as far as the window of `place`."""
        if self._epoch is None or self._epoch.number != epoch:
            blocks = self._blocks_at(np.arange(self.num_blocks, dtype=np.int64), epoch)
            self._epoch = _Epoch(epoch, blocks, np.zeros(1, dtype=np.int64))
        known = self._epoch
        while int(known.starts[-1]) <= place and len(known.starts) <= self.num_blocks:
            first = len(known.starts) - 1
            last = self.num_blocks if self.are_counts_known else first + self._blocks_per_window
            more = known.starts[-1] + np.cumsum(self.count_of(known.blocks[first:last]))
            known = _Epoch(epoch, known.blocks, np.concatenate([known.starts, more]))
        self._epoch = known
        return known


class Mixture:
    """Several data sets in one order, by weights; each goes through epochs of its own.

    Of every UNITS_PER_PATTERN units of the stage each data set gives a fixed number, in places that a
    keyed permutation chooses anew each time.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], *, fingerprint: str, seed: int
    ) -> None:
        self.orders = list(orders)
        self._key = f"{fingerprint}/{seed}/mixture"
        self._shares = (
            shares(weights, UNITS_PER_PATTERN) if len(orders) > 1 else np.array([UNITS_PER_PATTERN])
        )

    @property
    def num_units(self) -> int:
        """Units of one epoch: as many as all data sets have together."""
        return sum(order.num_units for order in self.orders)

    def has(self, epoch: int, place: int) -> bool:
        """Tell whether an epoch has so many units."""
        if len(self.orders) == 1:
            return self.orders[0].has(epoch, place)
        return place < self.num_units

    def units_at(self, epoch: int, places: Integers) -> Integers:
        """Return the ids of the units at some places of an epoch.

        Args:
            epoch: from 0.
            places: int64 of shape (n,), each below `num_units`.
        """
        if len(self.orders) == 1:
            return unit_ids(0, *self.orders[0].units_at(epoch, places))
        positions = epoch * self.num_units + places
        ids = np.empty_like(places)
        patterns = positions // UNITS_PER_PATTERN
        for pattern in np.unique(patterns):
            slots = np.arange(UNITS_PER_PATTERN, dtype=np.int64)
            owners = np.repeat(np.arange(len(self.orders)), self._shares)
            owners = owners[permute(slots, UNITS_PER_PATTERN, round_keys(f"{self._key}/{pattern}"))]
            here = patterns == pattern
            taken = positions[here] % UNITS_PER_PATTERN
            ids[here] = self._ids(int(pattern), owners, taken)
        return ids

    def _ids(self, pattern: int, owners: Integers, slots: Integers) -> Integers:
        ids = np.empty_like(slots)
        for i, order in enumerate(self.orders):
            mine = owners == i
            here = mine[slots]
            # The how-manieth unit of this data set, over all its epochs.
            ordinals = pattern * int(self._shares[i]) + np.cumsum(mine)[slots[here]] - 1
            epochs, places = np.divmod(ordinals, order.num_units)
            found = np.empty_like(ordinals)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                found[now] = unit_ids(i, *order.units_at(int(epoch), places[now]))
            ids[here] = found
        return ids


def shares(weights: Sequence[float], total: int) -> Integers:
    """Split `total` by weights into whole numbers of at least 1 (largest remainders)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    whole = np.maximum(1, np.floor(exact)).astype(np.int64)
    while whole.sum() < total:
        whole[np.argmax(exact - whole)] += 1
    while whole.sum() > total:
        whole[np.argmax(whole)] -= 1
    return whole


def round_keys(key: str) -> list[np.uint64]:
    """Return the round keys that a text stands for."""
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(part) for part in np.frombuffer(digest, dtype="<u8")]


def permute(places: Integers, size: int, keys: list[np.uint64]) -> Integers:
    """Permute [0, size) by a Feistel network on the next even power of two, walking cycles.

    Walking a cycle until it re-enters [0, size) makes a bijection of the larger domain one of the
    smaller (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The domain is less than
    four times the size, so a few rounds finish.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= np.uint64(size)).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: np.uint64, keys: list[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << half_bits) | right


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit moves every output bit.
    mixed = values + key
    for shift, multiplier in zip((np.uint64(30), np.uint64(27)), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return mixed ^ (mixed >> np.uint64(31))
