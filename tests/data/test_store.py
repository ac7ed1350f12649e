import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.store import Features, open_split, read_facts, write_split
from launcher.errors import DataError
from launcher.plan.plan import SplitFacts


def sequences(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50_000, length).tolist() for length in rng.integers(0, 30, count)]


def features(ids: list[list[int]], first: int = 0) -> Features:
    targets = np.array([len(x) // 2 for x in ids], dtype=np.int64)
    labels = [np.array([-100, *x[1:]][: len(x)], dtype=np.int64) for x in ids]
    return {
        "input_ids": ids,
        "labels": labels,
        "num_targets": targets,
        "kind": np.arange(first, first + len(ids)),
    }


def parts(ids: list[list[int]], *sizes: int) -> list[Features]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [features(ids[a:b], a) for a, b in itertools.pairwise(ends)]


def write(directory: Path, given: Any, labels: tuple[str, ...] = ()) -> SplitFacts:
    return write_split(directory, given, num_rows=lambda: 50, num_skipped=lambda: 3, labels=labels)


def test_round_trip_across_parts(tmp_path: Path) -> None:
    ids = sequences(40)
    facts = write(tmp_path / "s", parts(ids, 10, 0, 25, 5), ("no", "yes"))
    split = open_split(tmp_path / "s")
    assert split.num_samples == facts.num_samples == 40
    assert split.lengths.dtype == split.num_targets.dtype == np.int64
    assert split.lengths.tolist() == [len(x) for x in ids]
    assert split.num_targets.tolist() == [len(x) // 2 for x in ids]
    assert set(split.ragged) == {"input_ids", "labels"} and set(split.scalars) == {"num_targets", "kind"}
    asked = np.array([39, 0, 9, 10, 34, 35, 9])
    taken = split.take(asked)
    assert [x.tolist() for x in taken["input_ids"]] == [ids[i] for i in asked]
    assert [x.tolist() for x in taken["labels"]] == [[-100, *ids[i][1:]][: len(ids[i])] for i in asked]
    assert np.array_equal(taken["kind"], asked)
    assert all(x.dtype == np.int32 and not x.flags.owndata for x in taken["input_ids"])


def test_facts_are_exact_and_read_back(tmp_path: Path) -> None:
    ids = sequences(20)
    facts = write(tmp_path / "s", parts(ids, 20), ("no", "yes"))
    assert facts == read_facts(tmp_path / "s")
    assert facts == SplitFacts(
        num_rows=50,
        num_samples=20,
        exact=True,
        store=str(tmp_path / "s"),
        fingerprint=facts.fingerprint,
        num_skipped=3,
        num_tokens=sum(map(len, ids)),
        num_targets=sum(len(x) // 2 for x in ids),
        labels=("no", "yes"),
    )
    assert len(facts.fingerprint) == 32


def test_counts_are_asked_for_after_the_parts(tmp_path: Path) -> None:
    seen = []

    def stream() -> Any:
        for part in parts(sequences(6), 3, 3):
            seen.append(part)
            yield part

    facts = write_split(
        tmp_path / "s", stream(), num_rows=lambda: len(seen), num_skipped=lambda: -len(seen), labels=()
    )
    assert (facts.num_rows, facts.num_skipped) == (2, -2)


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    ids = sequences(30)
    one = write(tmp_path / "a", parts(ids, 30)).fingerprint
    assert write(tmp_path / "b", parts(ids, 1, 0, 12, 17)).fingerprint == one
    arrays = [
        {**p, "input_ids": [np.array(x, dtype=np.int64) for x in p["input_ids"]]} for p in parts(ids, 30)
    ]
    assert write(tmp_path / "c", arrays).fingerprint == one


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    base = {"input_ids": [[1, 2], [3]], "num_targets": np.array([1, 1])}
    changed = [
        base,
        {**base, "input_ids": [[1], [2, 3]]},
        {**base, "input_ids": [[3], [1, 2]]},
        {**base, "num_targets": np.array([1, 2])},
        {**base, "labels": np.array([1, 1])},
        {**base, "other": np.array([1, 1])},
    ]
    prints = {write(tmp_path / str(i), [part]).fingerprint for i, part in enumerate(changed)}
    assert len(prints) == len(changed)


@pytest.mark.parametrize("given", [[], [{"input_ids": [], "num_targets": np.array([])}]])
def test_an_empty_split(tmp_path: Path, given: list[Features]) -> None:
    assert write(tmp_path / "s", given).num_samples == 0
    split = open_split(tmp_path / "s")
    assert split.num_samples == 0 and split.lengths.shape == split.num_targets.shape == (0,)


def test_nothing_appears_when_a_part_fails(tmp_path: Path) -> None:
    def stream() -> Any:
        yield from parts(sequences(3), 3)
        raise DataError("row 4")

    with pytest.raises(DataError, match="row 4"):
        write(tmp_path / "s", stream())
    assert list(tmp_path.iterdir()) == []
    assert read_facts(tmp_path / "s") is None
    with pytest.raises(DataError, match="not a prepared split"):
        open_split(tmp_path / "s")


def test_the_first_whole_store_stays(tmp_path: Path) -> None:
    first = write(tmp_path / "s", parts(sequences(3), 3))
    assert write(tmp_path / "s", parts(sequences(9), 9)) == first


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    write(tmp_path / "s", parts(sequences(3), 3))
    (tmp_path / "s" / "part-00000.arrow").write_bytes(b"ARROW")
    with pytest.raises(DataError, match="part-00000.arrow: not readable, delete"):
        open_split(tmp_path / "s")
    (tmp_path / "s" / "meta.json").write_text(json.dumps({"format": 0}))
    assert read_facts(tmp_path / "s") is None


@pytest.mark.parametrize(
    ("ids", "error"), [([[2**40]], OverflowError), ([np.array([2**33])], OverflowError), ([[1.5]], TypeError)]
)
def test_what_is_no_32_bit_integer_is_refused(tmp_path: Path, ids: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        write(tmp_path / "s", [{"input_ids": ids, "num_targets": np.array([1])}])


def test_parts_must_have_the_same_features(tmp_path: Path) -> None:
    part = {"input_ids": [[1]], "num_targets": np.array([1])}
    with pytest.raises(ValueError, match="differ in their features"):
        write(tmp_path / "s", [part, {**part, "labels": np.array([1])}])
