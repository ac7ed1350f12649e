import numpy as np
import pytest

from launcher.data.pack import deal, padding_share

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


def test_sorting_saves_padding() -> None:
    unsorted = np.array_split(LENGTHS, 8)
    naive = 1 - LENGTHS.sum() / sum(len(chunk) * chunk.max() for chunk in unsorted)
    assert padding_share(LENGTHS, 8) < 0.1 < 0.3 < naive


def test_padding_share_of_equal_lengths_and_of_nothing_is_zero() -> None:
    assert padding_share(np.full(12, 9), 5) == 0.0
    assert padding_share(np.array([], dtype=np.int64), 3) == 0.0
