import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.feed import Batching, Feed, MicroBatch, StepBatch, Steps, eval_batches
from launcher.data.order import parts_of
from launcher.data.store import Counts, Store, block_name, commit, write_block
from tests.data import stores

PAD = 99_999
CAPACITY = 24
SIZES = [13, 7, 0, 21, 12]
NUM_SAMPLES = sum(SIZES)
IDS = stores.samples(NUM_SAMPLES)
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
KINDS = ["random", "bucketed", "tokens", "packed"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    stores.make(directory, stores.in_blocks(IDS, SIZES), capacity=CAPACITY)
    return directory


def feed(
    directory: Path,
    num_workers: int,
    rank: int,
    *,
    kind: str = "random",
    per_step: int = 16,
    micro_batch: int = 4,
    budget: int | None = None,
    seed: int = 1,
) -> Feed:
    batching = Batching(
        kind="bucketed" if kind == "tokens" else kind,  # type: ignore[arg-type]
        by_tokens=kind == "tokens",
        units_per_step=per_step,
        micro_batch=micro_batch,
        budget_tokens=budget,
    )
    return Feed(
        [Store(directory)],
        [1.0],
        batching,
        fingerprint="f",
        seed=seed,
        num_workers=num_workers,
        rank=rank,
        pad_token_id=PAD,
    )


def world(directory: Path, num_workers: int, step: int, **options: object) -> list[StepBatch]:
    return [feed(directory, num_workers, rank, **options).step(step) for rank in range(num_workers)]  # type: ignore[arg-type]


def names(samples: np.ndarray) -> list[int]:
    """The samples' places in the files."""
    _, blocks, rows = parts_of(samples)
    return (STARTS[blocks] + rows).tolist()


def held(ranks: list[StepBatch]) -> list[int]:
    return [name for batch in ranks for micro in batch.micro_batches for name in names(micro.samples)]


def steps_of_epoch(directory: Path, kind: str, per_step: int) -> int:
    units = Store(directory).num_units(np.arange(len(SIZES)), packed=kind == "packed").sum()
    return int(-(-units // per_step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("budget", [None, 40])
def test_every_world_trains_on_the_same_samples(
    made: Path, kind: str, num_workers: int, budget: int | None
) -> None:
    epoch: Counter[int] = Counter()
    for step in range(1, steps_of_epoch(made, kind, 16) + 1):
        alone, shared = (
            world(made, 1, step, kind=kind),
            world(made, num_workers, step, kind=kind, budget=budget),
        )
        assert sorted(held(alone)) == sorted(held(shared))
        # All ranks do the same number of micro-batches, and count the same.
        assert len({len(batch.micro_batches) for batch in shared}) == 1
        assert len({(b.num_targets, b.num_tokens, b.num_samples, b.num_slots) for b in shared}) == 1
        assert shared[0].num_tokens == sum(len(IDS[i]) for i in held(alone))
        assert shared[0].num_targets == sum(len(IDS[i]) - 1 for i in held(alone))
        slots = sum(m.features["input_ids"].size for b in shared for m in b.micro_batches)
        assert shared[0].num_slots == slots
        epoch.update(held(shared))
    assert set(epoch.values()) == {1} and len(epoch) == NUM_SAMPLES


@given(
    kind=st.sampled_from(KINDS),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 64]), min_size=1, max_size=5),
    per_step=st.integers(1, 20),
    micro_batch=st.integers(1, 8),
    budget=st.none() | st.integers(CAPACITY, 100),
    seed=st.integers(0, 2),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_kills_and_resizes_lose_and_repeat_nothing(
    made: Path,
    kind: str,
    worlds: list[int],
    per_step: int,
    micro_batch: int,
    budget: int | None,
    seed: int,
    data: st.DataObject,
) -> None:
    """Any number of kills, each resumed at a step by another number of workers, over an epoch and a half."""
    options = {"kind": kind, "per_step": per_step, "micro_batch": micro_batch, "budget": budget, "seed": seed}
    num_steps = steps_of_epoch(made, kind, per_step)
    cuts = sorted(data.draw(st.lists(st.integers(1, num_steps), max_size=4)))
    bounds = [0, *cuts, num_steps + num_steps // 2]
    trained: dict[int, list[int]] = {}
    for i, (done, until) in enumerate(itertools.pairwise(bounds)):
        num_workers = worlds[i % len(worlds)]
        ranks = [feed(made, num_workers, rank, **options) for rank in range(num_workers)]  # type: ignore[arg-type]
        for step in range(done + 1, until + 1):
            trained[step] = held([rank.step(step) for rank in ranks])
    whole = feed(made, 1, 0, **options)  # type: ignore[arg-type]
    for step in range(1, num_steps + num_steps // 2 + 1):
        assert sorted(trained[step]) == sorted(held([whole.step(step)]))
    first = Counter(name for step in range(1, num_steps + 1) for name in trained[step])
    assert set(first.values()) == {1} and len(first) == NUM_SAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_differ(made: Path, kind: str) -> None:
    per_epoch = steps_of_epoch(made, kind, 4)
    epochs = [
        [
            name
            for step in range(per_epoch)
            for name in held(world(made, 1, first + step, kind=kind, per_step=4))
        ]
        for first in (1, 1 + per_epoch)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_SAMPLES))
    assert epochs[0] != epochs[1]


def test_a_step_is_all_the_state_there_is(made: Path) -> None:
    for kind in KINDS:
        going, fresh = feed(made, 2, 1, kind=kind), feed(made, 2, 1, kind=kind)
        for step in range(1, 4):
            last = going.step(step)
        again = fresh.step(3)
        for one, other in zip(last.micro_batches, again.micro_batches, strict=True):
            assert all(np.array_equal(one.features[n], other.features[n]) for n in one.features)


def test_batches_come_ahead_in_order(made: Path) -> None:
    straight, ahead = feed(made, 1, 0), Steps(feed(made, 1, 0).step, 2, 5)
    for step in (2, 3, 4, 5):
        assert held([ahead(step)]) == held([straight.step(step)])
    ahead.close()


def test_what_fails_in_the_background_is_raised(tmp_path: Path) -> None:
    from launcher.data import store
    from launcher.errors import DataError

    stores.begin(tmp_path, [4, 4], nominal=False)
    (tmp_path / store.ERROR).write_text('{"message": "x.jsonl, line 3: not valid JSON"}')
    with pytest.raises(DataError, match="line 3"):
        Steps(feed(tmp_path, 1, 0).step, 1, 2)(1)


def test_ranks_run_neighbouring_chunks_at_the_same_time(made: Path) -> None:
    ranks = world(made, 3, 1, micro_batch=3)
    assert [[micro.chunk for micro in batch.micro_batches] for batch in ranks] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_waits_long_for_another(tmp_path: Path, kind: str) -> None:
    stores.make(tmp_path, [stores.samples(2048, longest=60)], capacity=60)
    slowest = slots = tokens = 0
    per_step = 32 if kind != "packed" else 16
    for step in range(1, steps_in(tmp_path, kind, per_step)):
        ranks = world(tmp_path, 4, step, kind=kind, per_step=per_step, budget=8 * 60)
        slowest += 4 * max(sum(m.features["input_ids"].size for m in batch.micro_batches) for batch in ranks)
        slots, tokens = slots + ranks[0].num_slots, tokens + ranks[0].num_tokens
    assert slowest / slots - 1 < {"random": 0.09, "bucketed": 0.06, "tokens": 0.09, "packed": 0.02}[kind]
    assert 1 - tokens / slots < {"random": 0.22, "bucketed": 0.05, "tokens": 0.05, "packed": 0.02}[kind]


def steps_in(directory: Path, kind: str, per_step: int) -> int:
    """Whole steps of an epoch of a store of one block."""
    return int(Store(directory).num_units(np.arange(1), packed=kind == "packed")[0]) // per_step


def test_answers_of_like_length_come_together_too(tmp_path: Path) -> None:
    # As translations have them: about as long as their sources.
    draw = np.random.default_rng(0)
    sources = draw.integers(5, 40, 2048)
    answers = np.maximum(1, np.round(sources * draw.normal(1.1, 0.2, len(sources)))).astype(int)
    stores.begin(tmp_path, [len(sources)])
    ragged = {
        "input_ids": stores.flat([[7] * n for n in sources]),
        "labels": stores.flat([[8] * n for n in answers]),
        "_characters": stores.flat([[0] * 500 for _ in sources]),  # Stays here: no model is given it.
    }
    counts = Counts(num_rows=len(sources), num_samples=len(sources), num_tokens=int(sources.sum()))
    targets = {"num_targets": answers.astype(np.int32)}
    write_block(tmp_path / block_name(0), ragged, targets, counts)
    commit(tmp_path, [block_name(0)])
    tokens = slots = widest = 0
    budget = 16 * 40
    for step in range(1, 2048 // 64 + 1):
        for batch in world(tmp_path, 2, step, kind="bucketed", per_step=64, budget=budget):
            for micro in batch.micro_batches:
                ids, labels = micro.features["input_ids"], micro.features["labels"]
                tokens += int((ids == 7).sum() + (labels == 8).sum())
                slots += ids.size + labels.size
                widest = max(widest, ids.size, labels.size)
    assert tokens == sources.sum() + answers.sum()
    assert 1 - tokens / slots < 0.13, "by sources alone it is 0.15"
    assert widest <= budget


def test_a_budget_bounds_every_micro_batch(made: Path) -> None:
    for step in range(1, 5):
        for batch in world(made, 2, step, budget=40):
            for micro in batch.micro_batches:
                assert micro.features["input_ids"].size <= 40


def test_padding(made: Path) -> None:
    for micro in world(made, 1, 2)[0].micro_batches:
        longest = max(len(IDS[i]) for i in names(micro.samples))
        assert set(micro.features) == {"input_ids", "attention_mask", "labels"}
        for row, name in enumerate(names(micro.samples)):
            ids, short = IDS[name], longest - len(IDS[name])
            got = {key: values[row].tolist() for key, values in micro.features.items()}
            assert got["input_ids"] == ids + [PAD] * short
            assert got["attention_mask"] == [1] * len(ids) + [0] * short
            assert got["labels"] == [-100, *ids[1:]] + [-100] * short
        for values in micro.features.values():
            assert values.dtype == np.int64 and values.shape == (len(micro.samples), longest)


def test_packs_lie_one_after_another(made: Path) -> None:
    seen = 0
    for step in range(1, 4):
        for micro in world(made, 1, step, kind="packed", per_step=8)[0].micro_batches:
            assert set(micro.features) == {"input_ids", "position_ids", "labels"}
            assert micro.features["input_ids"].shape[1] <= CAPACITY
            order = iter(names(micro.samples))
            for row in range(len(micro.features["input_ids"])):
                got = {key: values[row].tolist() for key, values in micro.features.items()}
                place = 0
                while place < len(got["input_ids"]) and got["input_ids"][place] != PAD:
                    ids = IDS[next(order)]
                    here = slice(place, place + len(ids))
                    assert got["input_ids"][here] == ids
                    assert got["position_ids"][here] == list(range(len(ids)))
                    assert got["labels"][here] == [-100, *ids[1:]]
                    place, seen = place + len(ids), seen + 1
                rest = len(got["input_ids"]) - place
                assert got["input_ids"][place:] == [PAD] * rest and got["labels"][place:] == [-100] * rest
                assert got["position_ids"][place:] == list(range(rest))
            assert next(order, None) is None
    assert seen > 20


def test_empty_chunks_weigh_nothing_and_cost_little(made: Path) -> None:
    for kind in KINDS:
        micros = [m for batch in world(made, 64, 1, kind=kind) for m in batch.micro_batches]
        empty = [micro for micro in micros if not len(micro.samples)]
        assert len(micros) == 64 and len(empty) >= 64 - 40
        shortest = min(len(IDS[i]) for micro in micros for i in names(micro.samples))
        for micro in empty:
            assert micro.features["input_ids"].shape == (1, shortest)
            assert (micro.features["labels"] == -100).all()


def test_one_label_for_each_sample(tmp_path: Path) -> None:
    stores.make(tmp_path, [IDS], labelled=True)
    for batch in world(tmp_path, 5, 4, micro_batch=2):
        for micro in batch.micro_batches:
            _, _, rows = parts_of(micro.samples)
            assert micro.features["labels"].tolist() == (rows.tolist() or [-100])
            assert micro.features["labels"].dtype == np.int64


def test_rows_without_a_sample_leave_their_place_empty(tmp_path: Path) -> None:
    stores.make(tmp_path, stores.in_blocks(IDS, SIZES), nominal=[20, 7, 9, 21, 12])
    for kind in ("random", "bucketed", "tokens"):
        per_epoch = -(-69 // 8)
        trained = Counter(
            name
            for step in range(1, per_epoch + 1)
            for name in held(world(tmp_path, 2, step, kind=kind, per_step=8))
        )
        assert set(trained.values()) == {1} and len(trained) == NUM_SAMPLES


def test_a_step_without_any_sample_still_runs(tmp_path: Path) -> None:
    stores.make(tmp_path, [[], IDS[:2]], nominal=[6, 2])
    ranks = [batch for step in range(1, 9) for batch in world(tmp_path, 2, step, per_step=1)]
    assert sum(batch.num_samples == 0 for batch in ranks) == 12
    assert all(
        (m.features["labels"] == -100).all() for b in ranks if not b.num_samples for m in b.micro_batches
    )
    assert Counter(held(ranks)) == Counter({0: 1, 1: 1}) or len(held(ranks)) == 2


def test_an_unfinished_store_gives_the_same_batches_as_the_whole_one(tmp_path: Path) -> None:
    sizes = [6] * 40
    ids = stores.samples(240)
    blocks = stores.in_blocks(ids, sizes)
    for nominal in (True, False):
        whole, part = tmp_path / f"whole{nominal}", tmp_path / f"part{nominal}"
        stores.make(whole, blocks, nominal=sizes if nominal else None)
        stores.begin(part, sizes, nominal=nominal)
        order = feed(whole, 1, 0)._order_of_all.orders[0]
        for block in order.blocks_of_window(0, 0).tolist():
            stores.write_block(part, block, blocks[block])
        for step in range(1, 96 // 16 + 1):
            for kind in ("random",):
                one, two = feed(whole, 1, 0, kind=kind), feed(part, 1, 0, kind=kind)
                assert np.array_equal(
                    np.concatenate([m.samples for m in one.step(step).micro_batches]),
                    np.concatenate([m.samples for m in two.step(step).micro_batches]),
                )


def evaluated(
    store: Path, num_workers: int, micro_batch: int, budget: int | None, **more: Any
) -> list[list[MicroBatch]]:
    """Every rank's micro-batches of an evaluation."""
    return [
        list(
            eval_batches(
                [Store(store)],
                micro_batch=micro_batch,
                budget_tokens=budget,
                num_workers=num_workers,
                rank=rank,
                pad_token_id=PAD,
                **more,
            )
        )
        for rank in range(num_workers)
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize(("micro_batch", "budget"), [(1, None), (4, None), (64, None), (4, 40)])
def test_evaluation_sees_each_sample_once(
    made: Path, num_workers: int, micro_batch: int, budget: int | None
) -> None:
    ranks = evaluated(made, num_workers, micro_batch, budget)
    assert len({len(rank) for rank in ranks}) == 1
    seen = [name for rank in ranks for micro in rank for name in names(micro.samples)]
    assert sorted(seen) == list(range(NUM_SAMPLES))
    for rank in ranks:
        widths = [micro.features["input_ids"].shape[1] for micro in rank]
        assert widths == sorted(widths, reverse=True)
        for micro in rank:
            assert len(micro.samples) or (micro.features["labels"] == -100).all()
            if budget is None:
                assert len(micro.samples) <= micro_batch
            else:
                assert micro.features["input_ids"].size <= budget


def test_evaluating_nothing(tmp_path: Path) -> None:
    stores.make(tmp_path, [[]])
    batches = eval_batches(
        [Store(tmp_path)], micro_batch=4, budget_tokens=None, num_workers=2, rank=1, pad_token_id=PAD
    )
    assert list(batches) == []


@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_are_mixed_by_their_weights_in_every_world(tmp_path: Path, kind: str) -> None:
    ids = stores.samples(400)
    stores.make(tmp_path / "a", stores.in_blocks(ids[:300], [100] * 3), capacity=CAPACITY, fingerprint="a")
    stores.make(tmp_path / "b", [ids[300:]], capacity=CAPACITY, fingerprint="b")

    def make(num_workers: int, rank: int) -> Feed:
        batching = Batching(
            kind="bucketed" if kind == "tokens" else kind,  # type: ignore[arg-type]
            by_tokens=kind == "tokens",
            units_per_step=16,
            micro_batch=4,
            budget_tokens=None,
        )
        return Feed(
            [Store(tmp_path / "a"), Store(tmp_path / "b")],
            [1.0, 3.0],
            batching,
            fingerprint="ab",
            seed=0,
            num_workers=num_workers,
            rank=rank,
            pad_token_id=PAD,
        )

    def ids_of(step: int, ranks: list[Feed]) -> list[int]:
        batches = [rank.step(step) for rank in ranks]
        return sorted(int(i) for batch in batches for micro in batch.micro_batches for i in micro.samples)

    alone, three = [make(1, 0)], [make(3, rank) for rank in range(3)]
    from_b = total = 0
    for step in range(1, 65):
        here = ids_of(step, alone)
        assert here == ids_of(step, three)
        from_b, total = from_b + sum(parts_of(np.array(here))[0]), total + len(here)
    # 3 of 4 units are of b, though it has a quarter of the samples.
    assert from_b / total == pytest.approx(0.75, abs=0.06)


def rows_in_windows(directory: Path, sizes: list[list[int]], seed: int = 0) -> list[list[tuple[int, ...]]]:
    """A store whose rows have several samples each; the samples of each row, block by block."""
    draw = np.random.default_rng(seed)
    stores.begin(directory, [sum(block) for block in sizes], nominal=False)
    groups: list[list[tuple[int, ...]]] = []
    first = 1
    for chunk, block in enumerate(sizes):
        ids = [(np.arange(n) + 50).tolist() for n in draw.integers(1, CAPACITY, size=sum(block))]
        for sample in ids:
            sample[0] = first  # the first token names the sample
            first += 1
        ragged = {"input_ids": stores.flat(ids), "labels": stores.flat([[0, 0]] * len(ids))}
        rows = np.repeat(np.arange(len(block), dtype=np.int32), block)
        scalars = {"num_targets": np.ones(len(ids), np.int32), "_row": rows}
        counts = Counts(num_rows=len(block), num_samples=len(ids), num_tokens=sum(map(len, ids)))
        write_block(directory / block_name(chunk), ragged, scalars, counts)
        groups.append([tuple(ids[i][0] for i in np.flatnonzero(rows == r)) for r in range(len(block))])
    commit(directory, [block_name(chunk) for chunk in range(len(sizes))])
    return groups


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
@pytest.mark.parametrize(("micro_batch", "budget"), [(1, None), (4, None), (1000, None), (4, 60)])
def test_evaluation_keeps_the_samples_of_a_row_together(
    tmp_path: Path, num_workers: int, micro_batch: int, budget: int | None
) -> None:
    # Blocks that end and begin with rows of one number; a row that is larger than a micro-batch.
    sizes = [[1, 3, 9, 1], [2], [4, 1, 1, 2, 5], [6], [1]]
    groups = [group for block in rows_in_windows(tmp_path, sizes) for group in block]
    ranks = evaluated(tmp_path, num_workers, micro_batch, budget, grouped=True)
    assert len({len(rank) for rank in ranks}) == 1
    row_of = {name: i for i, group in enumerate(groups) for name in group}
    in_order: dict[int, list[int]] = {}
    for micro in (micro for rank in ranks for micro in rank):
        if not len(micro.samples):
            assert (micro.features["labels"] == -100).all()
            continue
        in_order[micro.chunk] = names_here = micro.features["input_ids"][:, 0].tolist()
        here = [group for _, group in itertools.groupby(names_here, key=row_of.__getitem__)]
        assert len(here) == 1 or len(names_here) <= micro_batch or budget is not None
        if budget is not None and len({row_of[n] for n in names_here}) > 1:
            assert micro.features["input_ids"].size <= budget
    flat = [name for chunk in sorted(in_order) for name in in_order[chunk]]
    # Every sample once, each row's in a run and in order; rows by their longest.
    assert sorted(flat) == list(range(1, len(row_of) + 1))
    runs = [tuple(run) for _, run in itertools.groupby(flat, key=row_of.__getitem__)]
    assert sorted(runs) == sorted(groups)
    for chunk in in_order.values():
        assert all(set(groups[row_of[name]]) <= set(chunk) for name in chunk)
    lengths = Store(tmp_path)
    longest = {
        group: max(
            len(lengths.block(b).ragged["input_ids"][0][o[i] : o[i + 1]])
            for b in range(len(sizes))
            for o in [lengths.block(b).ragged["input_ids"][1]]
            for i in range(len(o) - 1)
            if lengths.block(b).ragged["input_ids"][0][o[i]] in group
        )
        for group in groups
    }
    assert runs == sorted(groups, key=lambda group: -longest[group])
    alone = eval_batches(
        [Store(tmp_path)],
        micro_batch=micro_batch,
        budget_tokens=budget,
        num_workers=1,
        rank=0,
        pad_token_id=PAD,
        grouped=True,
    )
    assert [m.features["input_ids"][:, 0].tolist() for m in alone] == [in_order[c] for c in sorted(in_order)]
