"""Which sample when: the global order as a pure function of (data fingerprint, seed, epoch).

A position is one integer: epoch = position // num_samples, place in the epoch = position % num_samples.
The order of an epoch is a keyed permutation, computed position by position: nothing is held in memory,
seeking costs nothing, and no rank owns a part of the data.
"""

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def samples_at(positions: Integers, *, num_samples: int, fingerprint: str, seed: int) -> Integers:
    """Return the sample at each position.

    Args:
        positions: int64, any shape-(n,) array of positions from 0, across epochs.
        num_samples: samples in the data set.
        fingerprint: of the prepared data; other data, another order.
        seed: the stage's seed.

    Returns:
        int64 of shape (n,): sample indices below `num_samples`. Over the positions of one epoch each
        sample occurs exactly once.
    """
    epochs = positions // num_samples
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        keys = _round_keys(fingerprint, seed, int(epoch))
        samples[here] = _permute(positions[here] % num_samples, num_samples, keys)
    return samples


def _round_keys(fingerprint: str, seed: int, epoch: int) -> list[np.uint64]:
    digest = hashlib.blake2b(f"{fingerprint}/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(key) for key in np.frombuffer(digest, dtype="<u8")]


def _permute(places: Integers, size: int, keys: list[np.uint64]) -> Integers:
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
