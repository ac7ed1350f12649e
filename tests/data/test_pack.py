import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.pack import best_fit, deal, rounds, steps_of_pool

LENGTHS = np.random.default_rng(0).integers(1, 500, 61)


@pytest.mark.parametrize("num_chunks", [1, 4, 7, 61, 70])
def test_every_sample_is_dealt_once_in_even_chunks(num_chunks: int) -> None:
    chunks = deal(LENGTHS, num_chunks)
    assert len(chunks) == num_chunks
    assert sorted(np.concatenate(chunks).tolist()) == list(range(61))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1


def test_chunks_are_longest_first() -> None:
    dealt = LENGTHS[np.concatenate(deal(LENGTHS, 8))]
    assert (np.diff(dealt) <= 0).all()


def padding_share(lengths: np.ndarray, num_chunks: int) -> float:
    """The share of a step's token slots that is padding."""
    chunks = [lengths[chunk] for chunk in deal(lengths, num_chunks) if len(chunk)]
    slots = sum(len(chunk) * int(chunk.max()) for chunk in chunks)
    return 1.0 - int(lengths.sum()) / slots if slots else 0.0


def test_sorting_saves_padding() -> None:
    unsorted = np.array_split(LENGTHS, 8)
    naive = 1 - LENGTHS.sum() / sum(len(chunk) * chunk.max() for chunk in unsorted)
    assert padding_share(LENGTHS, 8) < 0.1 < 0.3 < naive


def test_padding_share_of_equal_lengths_and_of_nothing_is_zero() -> None:
    assert padding_share(np.full(12, 9), 5) == 0.0
    assert padding_share(np.array([], dtype=np.int64), 3) == 0.0


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook way, sample by sample; returns the number of packs."""
    rooms: list[int] = []
    num_packs = 0
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = capacity if place == len(rooms) else rooms.pop(place)
        num_packs += room == capacity
        bisect.insort(rooms, room - length)
    return num_packs


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    capacity=st.integers(50, 120),
    key=st.text(max_size=3),
)
@settings(deadline=None)
def test_packs_are_never_too_long_and_as_few_as_best_fit_makes(
    lengths: list[int], capacity: int, key: str
) -> None:
    packs = best_fit(np.array(lengths, dtype=np.int64), capacity, key=key)
    assert packs.shape == (len(lengths),)
    loads = np.bincount(packs, weights=lengths)
    assert (loads <= capacity).all() and (loads > 0).all()
    assert len(loads) == plain_best_fit_decreasing(lengths, capacity)


def test_packing_waste_is_small() -> None:
    lengths = np.random.default_rng(1).lognormal(5.2, 0.5, 10_000).astype(np.int64).clip(1, 1024)
    num_packs = best_fit(lengths, 1024, key="k").max() + 1
    assert 1 - lengths.sum() / (num_packs * 1024) < 0.01


def test_samples_of_one_length_are_mixed() -> None:
    packs = best_fit(np.full(1000, 10, dtype=np.int64), 100, key="k")
    assert len(set(packs[:10].tolist())) > 5
    assert not np.array_equal(packs, best_fit(np.full(1000, 10, dtype=np.int64), 100, key="other"))


@given(
    lengths=st.lists(st.integers(1, 60), max_size=300),
    num_steps=st.integers(1, 16),
    samples_per_step=st.integers(1, 20),
    by_tokens=st.booleans(),
)
@settings(deadline=None)
def test_a_pool_is_cut_without_loss(
    lengths: list[int], num_steps: int, samples_per_step: int, by_tokens: bool
) -> None:
    lengths = lengths[: num_steps * samples_per_step]
    steps = steps_of_pool(
        np.array(lengths, dtype=np.int64),
        num_steps=num_steps,
        samples_per_step=samples_per_step,
        by_tokens=by_tokens,
        key="k",
    )
    assert len(steps) == num_steps
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    if len(lengths) >= num_steps:
        assert all(len(step) for step in steps)
    if not by_tokens:
        assert all(len(step) <= samples_per_step for step in steps)
    if not by_tokens and len(lengths) == num_steps * samples_per_step:
        assert all(len(step) == samples_per_step for step in steps)


def test_steps_are_of_like_length_and_in_no_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 512)
    steps = steps_of_pool(lengths, num_steps=16, samples_per_step=32, by_tokens=False, key="k")
    assert max(np.ptp(lengths[step]) for step in steps) <= 6
    means = [lengths[step].mean() for step in steps]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_steps_by_tokens_have_the_same_number_of_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 512)
    steps = steps_of_pool(lengths, num_steps=16, samples_per_step=32, by_tokens=True, key="k")
    tokens = [lengths[step].sum() for step in steps]
    assert max(tokens) - min(tokens) <= 2 * 60
    assert max(map(len, steps)) > 2 * min(map(len, steps))


def test_samples_without_tokens_are_dealt_too() -> None:
    chunks = deal(np.array([3, 3, 0, 0, 0]), 2, budget_tokens=64)
    assert sorted(np.concatenate(chunks).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lengths", "num_workers", "micro_batch", "budget", "expected"),
    [
        ([10] * 32, 1, 8, None, 4),
        ([10] * 32, 2, 8, None, 2),
        ([10] * 33, 2, 8, None, 3),
        ([10] * 32, 64, 8, None, 1),
        ([10] * 32, 2, 8, 160, 1),
        ([10] * 31 + [40], 2, 8, 160, 4),
        ([100] * 4, 2, 8, 64, 2),
        ([], 2, 8, 64, 1),
        ([], 2, 8, None, 1),
    ],
)
def test_rounds(
    lengths: list[int], num_workers: int, micro_batch: int, budget: int | None, expected: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    got = rounds(array, num_workers=num_workers, micro_batch=micro_batch, budget_tokens=budget)
    assert got == expected
