import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data import source
from launcher.data.source import Chunk, Piece, Rows, column_names, count_rows, list_files, read, refuse, stamp
from launcher.errors import DataError


def parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(path)


def whole(files: Sequence[str]) -> Chunk:
    return Chunk(tuple(Piece(file) for file in files), 0, None, True)


def rows(
    files: Sequence[str], columns: list[str], size: int = 8192, **options: Any
) -> list[tuple[str, list[Any]]]:
    options = {"reject": refuse, "rows_per_batch": size} | options
    return [
        (batch.where(i), [batch.columns[name][i] for name in columns])
        for batch in read(whole(files), columns, **options)
        for i in range(batch.num_rows)
    ]


def test_files_globs_directories_and_uris(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    b, a = jsonl(tmp_path / "b.jsonl", {}), parquet(tmp_path / "a.parquet", x=[1])
    c, d = jsonl(tmp_path / "sub" / "c.json", {}), jsonl(tmp_path / "sub" / "deep" / "d.ndjson", {})
    (tmp_path / "README.md").write_text("")
    (tmp_path / "_part.jsonl").write_text("")
    assert list_files(str(tmp_path)) == [a, b]
    assert list_files([b, a]) == [b, a]
    assert list_files(f"{tmp_path}/*") == [a, b]
    assert list_files(f"{tmp_path}/*.jsonl") == [b]
    assert list_files(f"{tmp_path}/*/*.json") == [c]
    assert list_files(f"{tmp_path}/**/*.nd*") == [d]
    assert list_files(f"{tmp_path}/[a-c].*") == list_files(f"{tmp_path}/?.*") == [a, b]
    assert list_files(f"{tmp_path}/**") == [a, b, c, d]
    assert list_files(f"file://{tmp_path}/**/c.json") == [f"file://{c}"]
    with pytest.raises(DataError, match="no such file"):
        list_files(f"{tmp_path}/**/json")
    assert list_files(f"{tmp_path}/**/*.json*") == [b, c]
    for given in (f"file://{tmp_path}", f"file://{tmp_path}/", f"file://{tmp_path}/*"):
        assert list_files(given) == [f"file://{a}", f"file://{b}"]
    assert count_rows([f"file://{a}", f"file://{b}"]) == (2, True)


def test_names_with_spaces_and_signs(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    file = jsonl(tmp_path / "a b" / "ü #1 100%.jsonl", {"x": 1})
    assert list_files(f"{tmp_path}/a b") == [file]
    (uri,) = list_files(f"file://{tmp_path}/a b/*.jsonl")
    assert [row for _, row in rows([uri], ["x"])] == [[1]]
    assert stamp(uri) == stamp(file)


def test_missing_file_names_the_one_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"/recipe/data/x.jsonl: no such file$"):
        list_files("/recipe/data/x.jsonl")
    (tmp_path / "data").mkdir()
    near = jsonl(tmp_path / "data" / "x.jsonl", {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"/recipe/data/x.jsonl: no such file; {near} exists"):
        list_files("/recipe/data/x.jsonl")
    with pytest.raises(DataError, match="no such file"):
        list_files(f"{tmp_path}/data/*.parquet")
    with pytest.raises(DataError, match="y.jsonl: no such file"):
        stamp(f"{tmp_path}/data/y.jsonl")


def test_what_cannot_be_read_says_what_can(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a,b\n")
    for given in ("x.txt", "*", ""):
        with pytest.raises(DataError, match=r"\.parquet, .*\.jsonl, \.ndjson or \.json, \.csv"):
            list_files(str(tmp_path / given) if given != "*" else f"{tmp_path}/*")
    with pytest.raises(DataError, match="split"):
        list_files(jsonl(tmp_path / "x.jsonl", {}), split="train")


@pytest.mark.parametrize("bad", ["nowhere://bucket/x.parquet", "s3://bucket/x.parquet?regoin=x"])
def test_a_uri_that_means_nothing(bad: str) -> None:
    with pytest.raises(DataError, match=r"x.parquet.*: (not a place|\"regoin\" is not known)"):
        list_files(bad)


def test_columns_come_from_headers_and_must_agree(tmp_path: Path) -> None:
    a, b = parquet(tmp_path / "a.parquet", x=[1], y=["p"]), parquet(tmp_path / "b.parquet", y=["q"], x=[2])
    assert column_names([a, b]) == ["x", "y"]
    other = parquet(tmp_path / "c.parquet", x=[1], z=[1])
    with pytest.raises(
        DataError, match=r"c.parquet: its columns \(x, z\) are not those of .*a.parquet \(x, y\)"
    ):
        column_names([a, b, other])
    assert column_names([a, b, other], needed=["x"]) == ["x", "y"]
    assert column_names([jsonl(tmp_path / "a.jsonl", "", {"k": 1, "l": 2})]) == ["k", "l"]


def test_types_must_agree(tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", x=pa.array([1], pa.int32()), y=["p"], z=pa.nulls(1))
    b = parquet(tmp_path / "b.parquet", x=[1], y=pa.array(["p"], pa.large_string()), z=["p"])
    assert column_names([a, b]) == ["x", "y", "z"]
    other = parquet(tmp_path / "c.parquet", x=["1"], y=["p"], z=["p"])
    with pytest.raises(DataError, match='c.parquet: its column "x" is string, but int32 in .*a.parquet'):
        column_names([a, b, other])
    assert column_names([a, b, other], needed=["y"]) == ["x", "y", "z"]


def test_optional_keys_of_json_lines(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b", "label": 1})
    b, c = jsonl(tmp_path / "b.jsonl", {"text": "c"}), jsonl(tmp_path / "c.jsonl", {"id": 1})
    assert column_names([a, b]) == ["text", "label"]
    with pytest.raises(DataError, match=r"c.jsonl: its columns \(id\) are not those of .*a.jsonl"):
        column_names([a, b, c])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, whatever the name says"])
def test_corrupt_parquet(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    for use in (column_names, count_rows, lambda files: rows(files, ["x"])):
        with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: .+"):
            use([str(file)])


def test_a_parquet_file_cut_in_half(tmp_path: Path) -> None:
    file = Path(parquet(tmp_path / "x.parquet", x=[f"text {i}" for i in range(2000)]))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: .+"):
        rows([str(file)], ["x"])


def test_truncated_parquet_pages(tmp_path: Path) -> None:
    file = Path(parquet(tmp_path / "x.parquet", x=[f"text {i}" for i in range(2000)]))
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: .+"):
        rows([str(file)], ["x"])


def test_a_corrupt_page_names_its_row_group(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    texts = [f"text {i} {i * 7919 % 1000}" for i in range(5000)]
    pq.write_table(pa.table({"x": texts}), file, row_group_size=1000)
    column = pq.ParquetFile(file).metadata.row_group(2).column(0)
    middle = column.dictionary_page_offset + column.total_compressed_size // 2
    content = bytearray(file.read_bytes())
    content[column.dictionary_page_offset : middle] = b"\xff" * (middle - column.dictionary_page_offset)
    file.write_bytes(bytes(content))
    batches = read(whole([str(file)]), ["x"], reject=refuse, rows_per_batch=1000)
    assert [next(batches).columns["x"], next(batches).columns["x"]] == [texts[:1000], texts[1000:2000]]
    with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: row group 3 of 5: .+"):
        next(batches)


def test_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b", b"\xff", b"c"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    file = parquet(tmp_path / "x.parquet", x=text, y=[1, 2, 3, 4])
    told: list[tuple[str, str]] = []
    got = rows([file], ["x", "y"], reject=lambda *bad: told.append(bad))
    assert [row for _, row in got] == [["a", 1], ["b", 2], ["c", 4]] and got[2][0].endswith("row 4")
    assert told == [(f"{file}, row 3", 'column "x": not UTF-8 at byte 1')]


def test_parquet_rows_across_batches_and_files(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": str(i)}] for i in range(7)]
    a = parquet(tmp_path / "a.parquet", x=list(range(7)), chat=chat, unused=[0.5] * 7)
    b = parquet(tmp_path / "b.parquet", x=[7, None])
    got = rows([a, b], ["chat", "x"], size=4)
    assert [place for place, _ in got] == [f"{a}, row {i}" for i in range(1, 8)] + [
        f"{b}, row 1",
        f"{b}, row 2",
    ]
    assert [row for _, row in got] == [[chat[i], i] for i in range(7)] + [[None, 7], [None, None]]
    assert count_rows([a, b]) == (9, True)
    assert rows([b], ["absent"]) == [(f"{b}, row 1", [None]), (f"{b}, row 2", [None])]


def test_json_lines_are_numbered_with_the_blank_ones(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"x": 1}, "", {"y": 2}, "  \t", {"x": 3, "y": None})
    with open(file, "a") as out:
        out.write('{"x": 4}')
    assert count_rows([file]) == (4, True)
    expected = [(1, [1, None]), (3, [None, 2]), (5, [3, None]), (6, [4, None])]
    for size in (1, 2, 100):
        assert rows([file], ["x", "y"], size) == [(f"{file}, line {n}", row) for n, row in expected]


def test_json_values_come_as_written(tmp_path: Path) -> None:
    values = [
        "2024-01-01",
        "2024-01-01 10:00:00",
        1,
        1.5,
        [{"a": 1}, {"b": "x"}],
        {"k": None},
        "é\u2028",
        True,
    ]
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps({"x": v}, ensure_ascii=False).encode() for v in values)
    )
    got = [row[0] for _, row in rows([str(file)], ["x"])]
    assert got == values and [type(v) for v in got] == [type(v) for v in values]
    assert column_names([str(file)]) == ["x"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"x": 1', "Expecting ',' delimiter at character 8"),
        ("[1, 2]", "not an object; .* one JSON object on each"),
        ("[", "Expecting value .* one JSON object on each"),
        ("3", "not an object"),
        ('{"x": nope}', "Expecting value at character 7"),
    ],
)
def test_bad_json_names_the_line(tmp_path: Path, bad: str, reason: str) -> None:
    good = [{"x": i} for i in range(5000)]
    file = jsonl(tmp_path / "x.jsonl", *good, "", bad, *good)
    with pytest.raises(DataError, match=f"x.jsonl, line 5002: not valid JSON: {reason}"):
        list(read(whole([file]), ["x"], reject=refuse, rows_per_batch=100))


def test_a_bad_row_among_many_under_both_policies(tmp_path: Path) -> None:
    good = [{"x": i} for i in range(50_000)]
    file = jsonl(tmp_path / "x.jsonl", *good, '{"x": ', *good, "[]")
    with pytest.raises(DataError, match="x.jsonl, line 50001: not valid JSON: .+"):
        list(read(whole([file]), ["x"], reject=refuse))
    told: list[tuple[str, str]] = []
    batches = list(read(whole([file]), ["x"], reject=lambda *bad: told.append(bad)))
    assert [x for batch in batches for x in batch.columns["x"]] == [*range(50_000), *range(50_000)]
    assert [where for where, _ in told] == [f"{file}, line 50001", f"{file}, line 100002"]
    assert batches[-1].where(batches[-1].num_rows - 1) == f"{file}, line 100001"


def test_a_file_that_is_one_array(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"x": "y" * 1000}] * 2000))
    with pytest.raises(DataError, match="x.json, line 1: not valid JSON: .* one JSON object on each"):
        column_names([str(tmp_path / "x.json")])


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON: not UTF-8 at byte 8"):
        rows([str(tmp_path / "x.jsonl")], ["x"])


def test_place_of_a_row(tmp_path: Path) -> None:
    assert Rows("/d/a.parquet", {}, [10, 12]).where(1) == "/d/a.parquet, row 13"
    file = jsonl(tmp_path / "a.jsonl", {"x": 1}, "", {"x": 2})
    assert Rows(file, {}, [0, 10]).where(1) == f"{file}, line 3"
    assert Rows("/gone/a.jsonl", {}, [0, 10]).where(1) == "/gone/a.jsonl, the line at byte 11"


def test_a_reject_that_fails_is_not_the_files_fault(tmp_path: Path) -> None:
    def reject(where: str, reason: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        rows([jsonl(tmp_path / "x.jsonl", "{")], ["x"], reject=reject)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(DataError, match=r"^s3://\*\*\*@bucket/x\?y=\*\*\*: ") as caught:
        list_files("s3://key:secret@bucket/x?y=1")
    assert "secret" not in str(caught.value)


def test_a_filter_on_a_date_takes_the_recipe_s_text(tmp_path: Path) -> None:
    import datetime

    days = [datetime.date(2024, 1, day) for day in range(1, 11)]
    pq.write_table(pa.table({"day": days, "x": list(range(10))}), tmp_path / "x.parquet")
    files = [str(tmp_path / "x.parquet")]
    for filters, count in (([["day", ">=", "2024-01-08"]], 3), ([["day", "in", ["2024-01-01"]]], 1)):
        source.check_filters(files, filters)
        (chunk,) = source.chunks(files)
        read = source.read(chunk, ["x"], filters=filters, reject=source.refuse)
        assert sum(rows.num_rows for rows in read) == count
    with pytest.raises(DataError, match="cannot be compared"):
        source.check_filters(files, [["day", ">=", "soon"]])
