from pathlib import Path

import numpy as np
import pytest

from launcher.data.feed import Feed, MicroBatch, StepBatch, eval_batches
from launcher.data.order import samples_at
from launcher.data.store import Split, open_split, write_split

PAD = 99
NUM_SAMPLES = 53
IDS = [
    (np.arange(length) + 100 * i + 1).tolist()
    for i, length in enumerate(np.random.default_rng(0).permutation(NUM_SAMPLES) % 17 + 1)
]


def make(directory: Path, labels: object) -> Split:
    targets = np.array([max(len(x) - 1, 0) for x in IDS])
    part = {
        "input_ids": IDS,
        "labels": labels,
        "token_type_ids": [[1] * len(x) for x in IDS],
        "num_targets": targets,
    }
    write_split(directory, [part], num_rows=lambda: NUM_SAMPLES, num_skipped=lambda: 0, labels=())
    return open_split(directory)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return make(tmp_path / "lm", [[-100, *x[1:]] for x in IDS])


def feed(split: Split, num_workers: int, rank: int, accumulation: int = 2, num_positions: int = 120) -> Feed:
    return Feed(
        split,
        fingerprint="f",
        seed=3,
        num_positions=num_positions,
        samples_per_step=16,
        accumulation=accumulation,
        num_workers=num_workers,
        rank=rank,
        pad_token_id=PAD,
    )


def world(split: Split, num_workers: int, step: int, accumulation: int = 2) -> list[StepBatch]:
    return [feed(split, num_workers, rank, accumulation).step(step) for rank in range(num_workers)]


def by_chunk(ranks: list[StepBatch]) -> dict[int, MicroBatch]:
    return {micro.chunk: micro for batch in ranks for micro in batch.micro_batches}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_step_is_its_positions_samples_in_any_world(split: Split, num_workers: int, step: int) -> None:
    positions = np.arange((step - 1) * 16, min(step * 16, 120))
    expected = samples_at(positions, num_samples=NUM_SAMPLES, fingerprint="f", seed=3)
    ranks = world(split, num_workers, step)
    held = [micro.samples for batch in ranks for micro in batch.micro_batches]
    assert sorted(np.concatenate(held).tolist()) == sorted(expected.tolist())
    for batch in ranks:
        assert batch.positions == range(positions[0], positions[-1] + 1)
        assert len(batch.micro_batches) == 2
        assert batch.num_samples == len(positions)
        assert batch.num_tokens == sum(len(IDS[i]) for i in expected)
        assert batch.num_targets == sum(len(IDS[i]) - 1 for i in expected)


@pytest.mark.parametrize(("num_workers", "accumulation"), [(2, 2), (4, 1)])
def test_chunks_do_not_depend_on_the_world(split: Split, num_workers: int, accumulation: int) -> None:
    for step in (1, 4, 8):
        alone = by_chunk(world(split, 1, step, accumulation=4))
        shared = by_chunk(world(split, num_workers, step, accumulation))
        assert alone.keys() == shared.keys() == set(range(4))
        for chunk, micro in alone.items():
            assert np.array_equal(micro.samples, shared[chunk].samples)
            for name, values in micro.features.items():
                assert np.array_equal(values, shared[chunk].features[name])


def test_ranks_run_neighbouring_chunks_at_the_same_time(split: Split) -> None:
    ranks = world(split, 3, 1)
    assert [[micro.chunk for micro in batch.micro_batches] for batch in ranks] == [[0, 3], [1, 4], [2, 5]]


def test_padding(split: Split) -> None:
    for micro in by_chunk(world(split, 2, 2)).values():
        longest = max(len(IDS[i]) for i in micro.samples)
        assert set(micro.features) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
        for row, sample in enumerate(micro.samples):
            ids, short = IDS[sample], longest - len(IDS[sample])
            got = {name: values[row].tolist() for name, values in micro.features.items()}
            assert got["input_ids"] == ids + [PAD] * short
            assert got["attention_mask"] == [1] * len(ids) + [0] * short
            assert got["labels"] == [-100, *ids[1:]] + [-100] * short
            assert got["token_type_ids"] == [1] * len(ids) + [0] * short
        for values in micro.features.values():
            assert values.dtype == np.int64 and values.shape == (len(micro.samples), longest)


def test_empty_chunks_weigh_nothing_and_cost_little(split: Split) -> None:
    chunks = by_chunk(world(split, 5, 8, accumulation=2))
    empty = [micro for micro in chunks.values() if not len(micro.samples)]
    assert len(empty) == 2 and {micro.chunk for micro in empty} == {8, 9}
    held = np.concatenate([micro.samples for micro in chunks.values()])
    for micro in empty:
        assert micro.samples.dtype == np.int64
        assert micro.features["input_ids"].shape == (1, min(len(IDS[i]) for i in held))
        assert micro.features["attention_mask"].all() and (micro.features["labels"] == -100).all()


def test_one_label_for_each_sample(tmp_path: Path) -> None:
    split = make(tmp_path / "classes", np.arange(NUM_SAMPLES) % 4)
    chunks = by_chunk(world(split, 5, 8)).values()
    for micro in chunks:
        expected = (micro.samples % 4).tolist() or [-100]
        assert micro.features["labels"].tolist() == expected and micro.features["labels"].dtype == np.int64


def test_a_step_is_all_the_state_there_is(split: Split) -> None:
    going, fresh = feed(split, 2, 1), feed(split, 2, 1)
    for step in range(1, 6):
        last = going.step(step)
    again = fresh.step(5)
    for one, other in zip(last.micro_batches, again.micro_batches, strict=True):
        assert np.array_equal(one.features["input_ids"], other.features["input_ids"])


def test_steps_end_with_the_positions(split: Split) -> None:
    whole = feed(split, 1, 0)
    assert whole.step(8).positions == range(112, 120)
    for step in (0, 9):
        with pytest.raises(IndexError):
            whole.step(step)


def test_an_epoch_holds_every_sample_once(split: Split) -> None:
    whole = feed(split, 1, 0, num_positions=NUM_SAMPLES)
    held = [micro.samples for step in range(1, 5) for micro in whole.step(step).micro_batches]
    assert sorted(np.concatenate(held).tolist()) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_evaluation_sees_each_sample_once(split: Split, num_workers: int, micro_batch: int) -> None:
    ranks = [
        list(
            eval_batches(split, micro_batch=micro_batch, num_workers=num_workers, rank=rank, pad_token_id=PAD)
        )
        for rank in range(num_workers)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    held = np.concatenate([micro.samples for rank in ranks for micro in rank])
    assert sorted(held.tolist()) == list(range(NUM_SAMPLES))
    assert all(len(micro.samples) <= micro_batch for rank in ranks for micro in rank)
    for rank in ranks:
        widths = [micro.features["input_ids"].shape[1] for micro in rank]
        assert widths == sorted(widths, reverse=True)
        for micro in rank:
            assert len(micro.samples) or (micro.features["labels"] == -100).all()


def test_evaluating_nothing(tmp_path: Path) -> None:
    write_split(tmp_path / "s", [], num_rows=lambda: 0, num_skipped=lambda: 0, labels=())
    split = open_split(tmp_path / "s")
    assert list(eval_batches(split, micro_batch=4, num_workers=2, rank=1, pad_token_id=PAD)) == []
