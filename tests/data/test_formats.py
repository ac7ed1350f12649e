import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from launcher.data.source import (
    Chunk,
    Piece,
    check_filters,
    column_names,
    count_rows,
    list_files,
    read,
    refuse,
)
from launcher.errors import DataError

TABLE = pa.table({"x": list(range(10)), "text": [f"t{i}" for i in range(10)]})


def rows(file: str, columns: list[str], **options: Any) -> list[tuple[int, list[Any]]]:
    options = {"reject": refuse, "rows_per_batch": 3} | options
    return [
        (batch.numbers[i], [batch.columns[name][i] for name in columns])
        for batch in read(Chunk((Piece(file),), 0, None, True), columns, **options)
        for i in range(batch.num_rows)
    ]


def arrow(path: Path, table: pa.Table = TABLE, *, is_stream: bool = False) -> str:
    with (ipc.new_stream if is_stream else ipc.new_file)(path, table.schema) as out:
        out.write_table(table, max_chunksize=4)
    return str(path)


def packed(path: Path, content: bytes) -> str:
    with pa.CompressedOutputStream(str(path), "gzip" if path.suffix == ".gz" else "zstd") as out:
        out.write(content)
    return str(path)


@pytest.mark.parametrize("name", ["x.arrow", "x.ipc", "stream.arrow", "x.feather"])
def test_arrow_files_and_streams(tmp_path: Path, name: str) -> None:
    if name == "x.feather":
        feather.write_feather(TABLE, tmp_path / name, chunksize=4)
        file = str(tmp_path / name)
    else:
        file = arrow(tmp_path / name, is_stream=name.startswith("stream"))
    assert column_names([file]) == ["x", "text"] and count_rows([file]) == (10, True)
    assert rows(file, ["text", "absent"]) == [(i, [f"t{i}", None]) for i in range(10)]
    second = Chunk((Piece(file, 1, 3),), 0, None, True)
    (got,) = (read(second, ["x"], reject=refuse, rows_per_batch=4),)
    assert [(list(b.numbers), b.columns["x"]) for b in got] == [([4, 5, 6, 7],) * 2, ([8, 9],) * 2]


@pytest.mark.parametrize("is_stream", [True, False])
def test_unreadable_arrow(tmp_path: Path, is_stream: bool) -> None:
    file = Path(arrow(tmp_path / "x.arrow", is_stream=is_stream))
    content = file.read_bytes()
    for broken in (b"", b"ARROW1", b"no arrow at all", content[: len(content) // 2]):
        file.write_bytes(broken)
        for use in (column_names, count_rows) if len(broken) < 20 else (count_rows,):
            with pytest.raises(DataError, match="x.arrow: not a readable Arrow file: .+"):
                use([str(file)])
        with pytest.raises(DataError, match="x.arrow: not a readable Arrow file: .+"):
            rows(str(file), ["x"])


def test_an_arrow_file_of_no_rows(tmp_path: Path) -> None:
    for is_stream in (True, False):
        file = arrow(tmp_path / "x.arrow", TABLE.slice(0, 0), is_stream=is_stream)
        assert count_rows([file]) == (0, True) and rows(file, ["x"]) == []
        assert column_names([file]) == ["x", "text"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"x": i}).encode() + b"\n" for i in range(10)]
    file = packed(tmp_path / f"x.jsonl{suffix}", b"".join(lines))
    assert list_files(str(tmp_path)) == [file]
    assert column_names([file]) == ["x"] and count_rows([file]) == (10, True)
    assert rows(file, ["x"]) == [(9 * i, [i]) for i in range(10)]
    bad = packed(tmp_path / f"y.jsonl{suffix}", b"".join(lines[:5]) + b"\n?\n")
    with pytest.raises(DataError, match=rf"y.jsonl{suffix}, line 7: not valid JSON"):
        rows(bad, ["x"])
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"x.jsonl{suffix}: cannot be read: .+"):
        rows(file, ["x"])


def test_csv_and_tsv(tmp_path: Path) -> None:
    text = 'id,text,label,score,day,zip\n1,"a, ""b""\nc",yes,0.5,2024-01-01,12\n\n2,,no,,2024-01-02,N/A\n'
    (tmp_path / "x.csv").write_text(text)
    file = str(tmp_path / "x.csv")
    assert column_names([file]) == ["id", "text", "label", "score", "day", "zip"]
    assert count_rows([file]) == (2, True)
    expected = [
        (0, [1, 'a, "b"\nc', "yes", 0.5, "2024-01-01", 12]),
        (1, [2, "", "no", None, "2024-01-02", None]),
    ]
    assert rows(file, column_names([file])) == expected
    assert rows(file, ["absent", "id"]) == [(0, [None, 1]), (1, [None, 2])]
    for name in ("y.csv.gz", "y.csv.zst"):
        assert rows(packed(tmp_path / name, text.encode()), column_names([file])) == expected
    tsv = packed(tmp_path / "x.tsv.gz", b"\xef\xbb\xbfa\tb\nx,y\t1\n")
    assert rows(tsv, ["a", "b"]) == [(0, ["x,y", 1])] and count_rows([tsv]) == (1, True)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz", "x.csv.zst", "x.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n"])
def test_empty_files_have_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    if name.endswith((".gz", ".zst")) and content:
        packed(tmp_path / name, content)
    file = str(tmp_path / name)
    assert count_rows([file]) == (0, True) and column_names([file]) == [] and rows(file, ["x"]) == []


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    lines = [f"{i},text {i}" for i in range(100_000)]
    lines[10], lines[70_000], lines[99_999] = "10,a,b", "70000", "x"
    lines[90_000], lines[90_001] = "many,text", "90001,\udcff"
    file.write_bytes("\n".join(["n,text", *lines]).encode(errors="surrogateescape"))
    told: dict[str, str] = {}
    got = rows(str(file), ["n", "text"], reject=told.setdefault, rows_per_batch=1000)
    bad = [10, 70_000, 90_000, 90_001, 99_999]
    assert [row for row, _ in got] == [row[0] for _, row in got]
    assert [row for row, _ in got] == [i for i in range(100_000) if i not in bad]
    assert sorted(told) == sorted(f"{file}, row {i + 1}" for i in bad)
    assert told[f"{file}, row 11"] == "3 fields where the header has 2: '10,a,b'"
    assert told[f"{file}, row 90001"].startswith('column "n": "many" is not a whole number')
    assert "not UTF-8" in told[f"{file}, row 90002"]
    with pytest.raises(DataError, match="x.csv, row 11: 3 fields where the header has 2"):
        rows(str(file), ["n"])


def test_an_open_quote_and_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('a,b\n1,"x\n' + "2,y\n" * (3 << 20))
    with pytest.raises(DataError, match="x.csv: a row is longer than 4 MiB; is a quote left open"):
        rows(str(tmp_path / "x.csv"), ["b"])
    (tmp_path / "y.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match='y.csv: has two columns named "a"'):
        column_names([str(tmp_path / "y.csv")])


def test_counts_are_estimated_where_files_are_large(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"x": i, "text": "word " * 20}) + "\n" for i in range(30_000))
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.csv").write_text("a,b\n" + "1,some text\n" * 200_000)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as out:
        out.write(lines)
    for name, expected in (("x.jsonl", 30_000), ("x.jsonl.gz", 30_000), ("x.csv", 200_000)):
        count, is_exact = count_rows([str(tmp_path / name)])
        assert count == pytest.approx(expected, rel=0.25) and not is_exact


def test_saved_data_sets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"x": list(range(10)), "label": ["a", "b"] * 5})
    data = data.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    data.select([9, 3, 4]).save_to_disk(tmp_path / "one")
    (file,) = list_files(str(tmp_path / "one"))
    assert file.endswith(".arrow") and rows(file, ["x", "label"]) == [(0, [9, 1]), (1, [3, 1]), (2, [4, 0])]
    assert list_files(f"file://{tmp_path}/one") == [f"file://{file}"]
    splits = datasets.DatasetDict({"train": data, "test": data.select(range(2))})
    splits.save_to_disk(tmp_path / "two", num_shards={"train": 3, "test": 1})
    train = list_files(str(tmp_path / "two"))
    assert len(train) == 3 and train == list_files(str(tmp_path / "two"), split="train")
    assert [row[0] for file in train for _, row in rows(file, ["x"])] == list(range(10))
    assert count_rows(list_files(str(tmp_path / "two"), split="test")) == (2, True)
    with pytest.raises(DataError, match='two: has no split "tset" .did you mean "test".*: train, test'):
        list_files(str(tmp_path / "two"), split="tset")
    with pytest.raises(DataError, match='one: is one data set, without splits, not "test"'):
        list_files(str(tmp_path / "one"), split="test")


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    local = tmp_path / "data"
    local.mkdir()
    (local / "train.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (local / "test.jsonl").write_text('{"x": 3}\n')
    train, test = list_files(f"hub:{local}"), list_files(f"hub:{local}", split="test")
    assert [row for file in train for _, row in rows(file, ["x"])] == [[1], [2]]
    assert [row for file in test for _, row in rows(file, ["x"])] == [[3]]
    with pytest.raises(DataError, match='hub:.*data: split "dev" cannot be loaded: .*dev.*'):
        list_files(f"hub:{local}", split="dev")
    with pytest.raises(DataError, match="is not the name of a whole split"):
        list_files(f"hub:{local}", split="train[:1]")
    with pytest.raises(DataError, match="a config is for a data set of the hub"):
        list_files(str(local), config="x")


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        DataError, match='hub:nobody/nothing: split "train" cannot be loaded: .*nothing.* on the Hub'
    ):
        list_files("hub:nobody/nothing")


FILTERED = ["x.parquet", "x.arrow", "x.jsonl", "x.csv"]


def written(path: Path) -> str:
    table = pa.table({"x": [*range(99), None], "text": [f"t{i % 3}" for i in range(100)]})
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=10)
        case ".arrow":
            arrow(path, table)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        case ".csv":
            lines = [f"{'' if row['x'] is None else row['x']},{row['text']}\n" for row in table.to_pylist()]
            path.write_text("x,text\n" + "".join(lines))
    return str(path)


@pytest.mark.parametrize("name", FILTERED)
def test_filters(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name)

    def kept(*filters: list[Any]) -> list[int]:
        return [row[0] for _, row in rows(file, ["x"], filters=filters)]

    assert kept(["x", ">=", 90], ["text", "!=", "t0"]) == [91, 92, 94, 95, 97, 98]
    assert kept(["text", "in", ["t1", "t2"]], ["x", "<", 5]) == [1, 2, 4]
    assert kept(["text", "not in", ["t1", "t2"]], ["x", "<", 5.5]) == [0, 3]
    assert kept(["x", ">", 1000]) == []
    for bad in (["x", "<", "a"], ["x", "~", 1], ["x", "in", 3], ["x", "<"]):
        with pytest.raises(DataError, match=r'filter \["x", '):
            kept(bad)
    with pytest.raises(DataError, match=r'filter \["text", "<", 3\]: .*column "text" cannot be compared'):
        kept(["text", "<", 3])
    if name != "x.jsonl":
        with pytest.raises(DataError, match=r'filter \["txet", .* no column "txet" .did you mean "text"'):
            kept(["txet", "==", "t1"])


def test_filters_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    files = [written(tmp_path / name) for name in FILTERED]
    check_filters(files, [["x", ">", 3], ["text", "in", ["t1"]]])
    for bad, why in (
        (["txet", "==", "t1"], 'x.parquet has no column "txet" .did you mean "text"'),
        (["text", "<", 3], 'x.parquet: column "text" cannot be compared with 3'),
        (["text", "like", "t"], "must be .column, operator, value. with an operator of =="),
        ("text", "must be"),
        (["text", "in", []], '"in" wants a list of values'),
    ):
        with pytest.raises(DataError, match=f"^filter .*: .*{why}"):
            check_filters(files, [bad])
    with pytest.raises(DataError, match='x.jsonl has no column "y"; it has: x, text'):
        check_filters([files[2]], [["y", "==", 1]])


@pytest.mark.parametrize("name", FILTERED)
def test_parts_are_disjoint_and_whole(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name)
    parts = [(0.0, 0.2), (0.2, 0.7), (0.7, 1.0)]
    found = [[number for number, _ in rows(file, ["x"], part=part)] for part in parts]
    assert sorted(number for numbers in found for number in numbers) == [
        number for number, _ in rows(file, ["x"])
    ]
    assert [len(numbers) for numbers in found] == pytest.approx([20, 50, 30], abs=12)
    (tmp_path / "elsewhere").mkdir()
    moved = written(tmp_path / "elsewhere" / name)
    assert found[0] == [number for number, _ in rows(moved, ["x"], part=parts[0])]
