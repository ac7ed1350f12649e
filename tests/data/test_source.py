import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.source import Rows, batches, column_names, count_rows, list_files
from launcher.errors import DataError


def parquet(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(path)


def rows(files: list[str], columns: list[str], size: int = 8192) -> list[tuple[str, list[Any]]]:
    return [
        (batch.where(i), [batch.columns[name][i] for name in columns])
        for batch in batches(files, columns, size)
        for i in range(len(batch.columns[columns[0]]))
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
    assert count_rows([f"file://{a}", f"file://{b}"]) == 2


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


def test_what_cannot_be_read_says_what_can(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    for given in ("x.csv", "*", ""):
        with pytest.raises(DataError, match=r"\.parquet, \.jsonl, \.ndjson or \.json"):
            list_files(str(tmp_path / given) if given != "*" else f"{tmp_path}/*")


def test_columns_come_from_headers_and_must_agree(tmp_path: Path) -> None:
    a, b = parquet(tmp_path / "a.parquet", x=[1], y=["p"]), parquet(tmp_path / "b.parquet", y=["q"], x=[2])
    assert column_names([a, b]) == ["x", "y"]
    other = parquet(tmp_path / "c.parquet", x=[1], z=[1])
    with pytest.raises(
        DataError, match=r"c.parquet: its columns \(x, z\) are not those of .*a.parquet \(x, y\)"
    ):
        column_names([a, b, other])
    assert column_names([jsonl(tmp_path / "a.jsonl", "", {"k": 1, "l": 2})]) == ["k", "l"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, whatever the name says"])
def test_corrupt_parquet(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    for use in (column_names, count_rows, lambda files: list(batches(files, ["x"]))):
        with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: .+"):
            use([str(file)])


def test_truncated_parquet_pages(tmp_path: Path) -> None:
    file = Path(parquet(tmp_path / "x.parquet", x=[f"text {i}" for i in range(2000)]))
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="x.parquet: not a readable Parquet file: .+"):
        list(batches([str(file)], ["x"]))


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
    assert count_rows([a, b]) == 9
    assert rows([b], ["absent"]) == [(f"{b}, row 1", [None]), (f"{b}, row 2", [None])]


def test_json_lines_are_numbered_with_the_blank_ones(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"x": 1}, "", {"y": 2}, "  \t", {"x": 3, "y": None})
    with open(file, "a") as out:
        out.write('{"x": 4}')
    assert count_rows([file]) == 4
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
        list(batches([file], ["x"], 100))


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON: not UTF-8 at byte 8"):
        list(batches([str(tmp_path / "x.jsonl")], ["x"]))


def test_place_of_a_row() -> None:
    assert Rows("/d/a.parquet", 10, {}).where(2) == "/d/a.parquet, row 13"
    assert Rows("/d/a.jsonl", 10, {}).where(2) == "/d/a.jsonl, line 13"
