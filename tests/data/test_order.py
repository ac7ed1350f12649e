import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import Mixture, Order, parts_of, permute, round_keys, shares, unit_ids


def order(
    counts: list[int], *, seed: int = 1, fingerprint: str = "f", known: bool = True, window: int = 16
) -> Order:
    array = np.array(counts, dtype=np.int64)
    return Order(
        len(counts),
        lambda blocks: array[blocks],
        fingerprint=fingerprint,
        seed=seed,
        are_counts_known=known,
        blocks_per_window=window,
    )


def epoch(order: Order, number: int = 0) -> np.ndarray:
    """Every unit of an epoch, as its place in the files."""
    blocks, rows = order.units_at(number, np.arange(order.num_units, dtype=np.int64))
    counts = order.count_of(np.arange(order.num_blocks))
    return np.concatenate([[0], np.cumsum(counts)])[blocks] + rows


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    number=st.integers(0, 5),
    window=st.integers(1, 20),
    known=st.booleans(),
)
@settings(deadline=None)
def test_every_epoch_has_every_unit_once(counts: list[int], number: int, window: int, known: bool) -> None:
    units = epoch(order(counts, known=known, window=window), number)
    assert np.array_equal(np.sort(units), np.arange(sum(counts)))


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), data=st.data())
@settings(deadline=None)
def test_any_place_is_found_alone(counts: list[int], data: st.DataObject) -> None:
    whole, total = order(counts), sum(counts)
    places = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20)))
    number = data.draw(st.integers(0, 3))
    all_blocks, all_rows = whole.units_at(number, np.arange(total))
    blocks, rows = order(counts).units_at(number, places)
    assert np.array_equal(blocks, all_blocks[places]) and np.array_equal(rows, all_rows[places])


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    counts = [50] * 40
    orders = [
        epoch(order(counts)),
        epoch(order(counts), 1),
        epoch(order(counts, seed=2)),
        epoch(order(counts, fingerprint="g")),
    ]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert np.mean(one == other) < 0.02


@pytest.mark.parametrize("counts", [[20_000], [1250] * 16, [100] * 200], ids=["block", "window", "windows"])
@pytest.mark.parametrize("number", [0, 1])
def test_position_tells_nothing_of_the_file(counts: list[int], number: int) -> None:
    whole = order(counts)
    here, after = epoch(whole, number), epoch(whole, number + 1)
    # The standard deviation of a rank correlation of n independent pairs is 1/sqrt(n-1) = 0.007. Over
    # several windows, blocks are what is drawn: 13 windows of 16 of 200 blocks allow for more.
    bound = 0.035 if len(counts) <= 16 else 0.25
    for one, other in [(here, np.arange(20_000)), (here, after), (here[:-1], here[1:])]:
        assert abs(np.corrcoef(one, other)[0, 1]) < bound


def test_neighbours_come_from_different_files_and_classes() -> None:
    # 64 files of 200 samples, sorted by class: 4 classes of 16 files each.
    units = epoch(order([200] * 64))
    files, classes = units // 200, units // 3200
    # Within a window of 16 files, a neighbour is of the same file in 1 case of 16.
    assert np.mean(files[:-1] == files[1:]) < 1.3 / 16
    # Blocks are drawn at random, so a window holds all classes in about equal parts.
    assert np.mean(classes[:-1] == classes[1:]) < 0.4
    for window in range(4):
        shares_here = np.bincount(classes[window * 3200 : (window + 1) * 3200], minlength=4) / 3200
        assert shares_here.max() < 0.65


def test_no_more_blocks_are_asked_for_than_a_place_needs() -> None:
    asked: list[int] = []

    def count_of(blocks: np.ndarray) -> np.ndarray:
        asked.extend(blocks.tolist())
        return np.full(len(blocks), 10)

    lazy = Order(1000, count_of, fingerprint="f", seed=0, are_counts_known=False)
    lazy.units_at(0, np.arange(32))
    assert len(asked) == 16
    assert asked == lazy.blocks_of_window(0, 0).tolist()
    assert lazy.has(0, 170) and len(asked) == 32
    known = order([10] * 1000, seed=0)
    for place in (0, 159, 160, 319):
        blocks = lazy.units_at(0, np.array([place])), known.units_at(0, np.array([place]))
        assert np.array_equal(blocks[0], blocks[1])


def test_the_order_is_lazy_to_its_end() -> None:
    lazy = order([3, 0, 5], known=False, window=2)
    assert lazy.has(0, 7) and not lazy.has(0, 8)
    assert lazy.num_units == 8 and lazy.has(4, 7)


@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=10)
def test_a_mixture_keeps_its_weights_and_each_data_set_its_epochs(
    sizes: list[int], weights: list[float], seed: int
) -> None:
    weights = weights[: len(sizes)]

    def make() -> Mixture:
        orders = [order([size], fingerprint=str(i), seed=seed) for i, size in enumerate(sizes)]
        return Mixture(orders, weights, fingerprint="m", seed=seed)

    mixture = make()
    ids = np.concatenate(
        [
            mixture.units_at(number, np.arange(mixture.num_units))
            for number in range(4096 // mixture.num_units + 1)
        ]
    )
    sets, _, rows = parts_of(ids)
    wanted = shares(weights, 1024)
    first = np.bincount(sets[:1024], minlength=len(sizes))
    if len(sets) >= 1024:
        assert np.array_equal(first, wanted)
    for i, size in enumerate(sizes):
        mine = rows[sets == i]
        for begin in range(0, len(mine) - size + 1, size):
            assert sorted(mine[begin : begin + size]) == list(range(size))
    places = np.arange(mixture.num_units)[::7]
    assert np.array_equal(
        make().units_at(1, places), mixture.units_at(1, np.arange(mixture.num_units))[places]
    )


def test_shares_are_whole_and_none_is_lost() -> None:
    assert shares([0.7, 0.3], 1024).tolist() == [717, 307]
    assert shares([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert shares([1000, 1e-6], 1024).tolist() == [1023, 1]


def test_ids_hold_their_parts() -> None:
    blocks, rows = np.array([0, 5, (1 << 24) - 1]), np.array([0, 7, (1 << 32) - 1])
    for data_set in (0, 3, 127):
        got = parts_of(unit_ids(data_set, blocks, rows))
        assert (got[0] == data_set).all()
        assert np.array_equal(got[1], blocks) and np.array_equal(got[2], rows)


def test_order_never_changes_between_versions() -> None:
    # A resumed run must go on in the order it began with.
    assert permute(np.arange(10), 10, round_keys("f/1/0")).tolist() == [9, 5, 2, 0, 8, 4, 1, 7, 6, 3]
    assert epoch(order([4, 3, 5])).tolist() == [4, 9, 3, 8, 0, 2, 7, 10, 5, 1, 11, 6]
