"""Rows drawn from a split: the same ones each time, whole, from all over it, and not too many."""

from pathlib import Path

import numpy as np
import pytest

from launcher.data.feed import eval_batches
from launcher.data.split import Split
from launcher.data.store import Store
from tests.data import stores
from tests.data.test_feed import rows_in_windows

NUM_SAMPLES = 300


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    directory = tmp_path_factory.mktemp("store")
    ids = stores.samples(NUM_SAMPLES)
    return Split([stores.make(directory, stores.in_blocks(ids, [100, 150, 50]))])


def test_rows_come_from_all_over_and_are_the_same_each_time(split: Split) -> None:
    everything = split.all_samples()
    drawn, size = split.drawn(40, 10**6, fewest_rows=1, grouped=False)
    assert size == NUM_SAMPLES and len(drawn) == len(set(drawn.tolist())) == 40
    places = np.searchsorted(everything, drawn)
    assert (everything[places] == drawn).all() and (np.diff(places) > 0).all()
    # Not at even distances, and some from each hundred.
    assert len(set(np.diff(places).tolist())) > 5 and set((places // 100).tolist()) == {0, 1, 2}
    assert split.drawn(40, 10**6, fewest_rows=1, grouped=False)[0].tolist() == drawn.tolist()
    assert split.drawn(10**6, 10**9, fewest_rows=1, grouped=False)[0].tolist() == everything.tolist()


def test_long_rows_are_fewer(split: Split) -> None:
    most = 100
    drawn, _ = split.drawn(40, most, fewest_rows=1, grouped=False)
    assert 1 < len(drawn) < 40 and most - 17 < split.lengths(drawn).sum() <= most
    assert len(split.drawn(40, 1, fewest_rows=8, grouped=False)[0]) == 8
    assert len(split.drawn(5, 1, fewest_rows=8, grouped=False)[0]) == 5


def test_rows_of_several_samples_stay_whole(tmp_path: Path) -> None:
    sizes = [[1, 3, 9, 1], [2], [4, 1, 1, 2, 5], [6], [1]]
    groups = {group for block in rows_in_windows(tmp_path, sizes) for group in block}
    split = Split([Store(tmp_path)])
    drawn, size = split.drawn(5, 10**6, fewest_rows=1, grouped=True)
    assert size == len(groups)
    batches = list(
        eval_batches(
            [Store(tmp_path)],
            micro_batch=4,
            budget_tokens=None,
            num_workers=1,
            rank=0,
            pad_token_id=0,
            grouped=True,
            only=drawn,
        )
    )
    assert sorted(np.concatenate([batch.samples for batch in batches]).tolist()) == drawn.tolist()
    names = {int(name) for batch in batches for name in batch.features["input_ids"][:, 0]}
    whole = [group for group in groups if set(group) <= names]
    assert len(whole) == 5 and set().union(*whole) == names


def test_nothing_there(tmp_path: Path) -> None:
    split = Split([stores.make(tmp_path, [[]])])
    drawn, size = split.drawn(5, 100, fewest_rows=1, grouped=True)
    assert (len(drawn), size) == (0, 0)
