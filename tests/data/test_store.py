import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launcher.data import store
from launcher.data.order import unit_ids
from launcher.data.split import Split
from launcher.data.store import Counts, Store
from launcher.errors import DataError, StorageError
from tests.data import stores

SIZES = [10, 0, 25, 5]
IDS = stores.samples(40)


def made(directory: Path, **options: object) -> Store:
    return stores.make(directory, stores.in_blocks(IDS, SIZES), **options)  # type: ignore[arg-type]


def test_round_trip_across_blocks(tmp_path: Path) -> None:
    split = Split([made(tmp_path / "s")])
    everything = split.all_samples()
    assert len(everything) == 40
    for count in (0, 3, 10, 11, 40, 99):
        assert np.array_equal(split.first_samples(count), everything[:count])
    asked = everything[[39, 0, 9, 10, 34, 35, 9]]
    wanted = [IDS[i] for i in (39, 0, 9, 10, 34, 35, 9)]
    taken = split.ragged(asked)
    assert [x.tolist() for x in taken["input_ids"]] == wanted
    assert [x.tolist() for x in taken["target_mask"]] == [[0, *[1] * (len(x) - 1)] for x in wanted]
    assert all(not x.flags.owndata and not x.flags.writeable for x in taken["input_ids"])
    assert split.lengths(asked).tolist() == [len(x) for x in wanted]
    assert split.targets(asked).tolist() == [len(x) - 1 for x in wanted]


def test_scalars(tmp_path: Path) -> None:
    split = Split([made(tmp_path / "s", labelled=True)])
    asked = split.all_samples()[[39, 3, 12]]
    assert split.scalars(asked)["labels"].tolist() == [39, 3, 12]


def test_several_data_sets(tmp_path: Path) -> None:
    split = Split([made(tmp_path / "a"), stores.make(tmp_path / "b", [IDS[:3]])])
    everything = split.all_samples()
    assert len(everything) == 43
    assert [x.tolist() for x in split.ragged(everything[[41, 5]])["input_ids"]] == [IDS[1], IDS[5]]


def test_packs_hold_every_sample_once(tmp_path: Path) -> None:
    made_store = made(tmp_path / "s", capacity=20)
    split = Split([made_store], packed=True)
    counts = made_store.num_units(np.arange(4), packed=True)
    units = np.concatenate([unit_ids(0, np.full(n, b), np.arange(n)) for b, n in enumerate(counts)])
    samples, owners = split.samples_of(units)
    assert sorted(samples.tolist()) == sorted(split.all_samples().tolist())
    assert np.bincount(owners, weights=split.lengths(samples)).max() <= 20
    assert np.array_equal(owners, np.sort(owners)) and set(owners.tolist()) == set(range(len(units)))
    few, theirs = split.samples_of(units[[5, 2]])
    assert few[theirs == 0].tolist() == samples[owners == 5].tolist()
    assert few[theirs == 1].tolist() == samples[owners == 2].tolist()


def test_rows_without_a_sample_leave_holes(tmp_path: Path) -> None:
    made_store = made(tmp_path / "s", nominal=[12, 3, 25, 6])
    assert made_store.num_units(np.arange(4), packed=False).tolist() == [12, 3, 25, 6]
    units = np.concatenate([unit_ids(0, np.full(n, b), np.arange(n)) for b, n in enumerate([12, 3, 25, 6])])
    samples, owners = Split([made_store]).samples_of(units)
    assert len(samples) == 40 and not {10, 11, 12, 13, 14, 45} & set(owners.tolist())


def test_counts_of_a_whole_store(tmp_path: Path) -> None:
    made_store = made(tmp_path / "s", capacity=20)
    assert made_store.meta is not None
    counts = Counts(**made_store.meta["counts"])
    assert counts.num_samples == counts.num_rows == 40
    assert counts.num_tokens == sum(map(len, IDS)) and counts.num_targets == sum(len(x) - 1 for x in IDS)
    assert made_store.num_units(np.array([2, 0]), packed=False).tolist() == [25, 10]


def test_content_is_told_from_the_samples_alone(tmp_path: Path) -> None:
    prints = {}
    changed = [[5, 6, 7], [8]]
    for name, ids in [("a", changed), ("b", changed), ("c", [[5, 6], [7, 8]]), ("d", [[5, 6, 7], [9]])]:
        meta = stores.make(tmp_path / name, [ids]).meta
        assert meta is not None
        prints[name] = meta["content"]
    assert prints["a"] == prints["b"] and len(set(prints.values())) == 3


def test_a_reader_waits_for_a_block_that_is_being_made(tmp_path: Path) -> None:
    blocks = stores.in_blocks(IDS, SIZES)
    stores.begin(tmp_path, SIZES)
    stores.write_block(tmp_path, 0, blocks[0])
    reader = Store(tmp_path)
    assert reader.meta is None and reader.num_blocks == 4
    assert len(reader.block(0).lengths) == 10
    late = threading.Timer(0.4, stores.write_block, (tmp_path, 2, blocks[2]))
    late.start()
    began_s = time.monotonic()
    assert len(reader.block(2).lengths) == 25
    assert time.monotonic() - began_s > 0.3
    late.join()


def test_a_reader_is_told_why_no_block_comes(tmp_path: Path) -> None:
    stores.begin(tmp_path, SIZES)
    (tmp_path / store.ERROR).write_text(json.dumps({"message": "a.jsonl, line 7: not valid JSON"}))
    with pytest.raises(DataError, match="line 7: not valid JSON"):
        Store(tmp_path).block(0)


def test_a_reader_does_not_wait_for_a_preparation_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SILENT_S", 0.6)
    stores.begin(tmp_path, SIZES)
    beats = [threading.Timer(0.3 * i, (tmp_path / store.BEAT).touch) for i in range(1, 5)]
    late = threading.Timer(1.5, stores.write_block, (tmp_path, 1, [[1, 2]]))
    for timer in (*beats, late):
        timer.start()
    assert len(Store(tmp_path).block(1).lengths) == 1
    late.join()
    with pytest.raises(DataError, match="nobody makes block-000000.arrow any more"):
        Store(tmp_path).block(0)


def test_blocks_used_longest_ago_are_closed(tmp_path: Path) -> None:
    ids = stores.samples(30)
    stores.make(tmp_path, [[x] for x in ids])
    few = Store(tmp_path, most_open=4)
    for block in range(30):
        assert few.block(block).lengths.tolist() == [len(ids[block])]
    maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert maps <= 4


def test_nothing_appears_when_a_disk_is_full(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        directory = disk / "s"
        stores.begin(directory, [10, 10])
        stores.write_block(directory, 0, IDS[:10])
        with pytest.raises(StorageError, match="No space left on device; what was prepared so far is kept"):
            stores.write_block(directory, 1, [list(range(200_000))])
        assert sorted(file.name for file in directory.iterdir()) == ["block-000000.arrow", store.MANIFEST]
        assert store.block_counts(directory / "block-000000.arrow") is not None
        assert store.read_meta(directory) is None
    finally:
        os.system(f"umount -l {disk}")


def test_a_damaged_store_is_not_whole(tmp_path: Path) -> None:
    made(tmp_path / "s")
    block = tmp_path / "s" / "block-000002.arrow"
    block.write_bytes(block.read_bytes()[:-100])
    assert store.read_meta(tmp_path / "s") is None
    assert store.block_counts(block) is None
    with pytest.raises(DataError, match="block-000002.arrow: not readable, delete"):
        Store(tmp_path / "s").block(2)


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / store.MANIFEST).write_text(json.dumps({"format": 1}))
    assert store.read_manifest(tmp_path) is None
    with pytest.raises(DataError, match="another version"):
        Store(tmp_path)
