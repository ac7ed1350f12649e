import numpy as np
import pytest

from launcher.data.order import samples_at


def order(size: int, epoch: int = 0, fingerprint: str = "f", seed: int = 1) -> np.ndarray:
    positions = np.arange(epoch * size, (epoch + 1) * size, dtype=np.int64)
    return samples_at(positions, num_samples=size, fingerprint=fingerprint, seed=seed)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_is_a_permutation(size: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(size, epoch)), np.arange(size))


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    orders = [order(1000), order(1000, epoch=1), order(1000, seed=2), order(1000, fingerprint="g")]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert np.mean(one == other) < 0.02


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_order_is_uncorrelated_with_the_file_and_with_the_next_epoch(epoch: int) -> None:
    here, after = order(20_000, epoch), order(20_000, epoch + 1)
    # The standard deviation of a rank correlation of n independent pairs is 1/sqrt(n-1) = 0.007.
    for one, other in [(here, np.arange(20_000)), (here, after), (here[:-1], here[1:])]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.035


def test_random_access_equals_sequential() -> None:
    size = 777
    whole = np.concatenate([order(size, epoch) for epoch in range(3)])
    positions = np.random.default_rng(0).integers(0, 3 * size, 500)
    assert np.array_equal(samples_at(positions, num_samples=size, fingerprint="f", seed=1), whole[positions])


def test_order_never_changes_between_versions() -> None:
    # A resumed run must go on in the order it began with.
    assert order(10).tolist() == [9, 5, 2, 0, 8, 4, 1, 7, 6, 3]
