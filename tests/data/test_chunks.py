import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from launcher.data.source import Chunk, Piece, chunks, read, refuse
from launcher.errors import DataError


def test_row_groups_are_merged_and_split(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(1000))})
    small, large = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    pq.write_table(table, small, row_group_size=100, use_dictionary=False, compression="none")
    pq.write_table(table, large, use_dictionary=False, compression="none")
    size = pq.ParquetFile(small).metadata.row_group(0).total_byte_size
    found = chunks([small, large], target_bytes=3 * size)
    assert [chunk.pieces for chunk in found] == [
        (Piece(small, 0, 3),),
        (Piece(small, 3, 6),),
        (Piece(small, 6, 9),),
        (Piece(small, 9, 10),),
        (Piece(large, 0, 1),),
    ]
    assert [chunk.num_rows for chunk in found] == [300, 300, 300, 100, 1000]
    assert [chunk.is_bounded for chunk in found] == [True] * 4 + [False]
    assert found[0].num_bytes == 3 * size and found == chunks([small, large], target_bytes=3 * size)
    rows = [x for chunk in found for batch in read(chunk, ["x"], reject=refuse) for x in batch.columns["x"]]
    assert rows == [*range(1000), *range(1000)]
    numbers = [n for batch in read(found[1], ["x"], reject=refuse) for n in batch.numbers]
    assert numbers == list(range(300, 600))


@pytest.mark.parametrize("is_stream", [True, False])
def test_record_batches(tmp_path: Path, is_stream: bool) -> None:
    table = pa.table({"x": list(range(1000))})
    file = str(tmp_path / "x.arrow")
    with (ipc.new_stream if is_stream else ipc.new_file)(file, table.schema) as out:
        out.write_table(table, max_chunksize=100)
    found = chunks([file], target_bytes=Path(file).stat().st_size // 4)
    assert [chunk.num_rows for chunk in found] == [300, 300, 300, 100]
    assert all(chunk.is_bounded for chunk in found)
    for i, chunk in enumerate(found):
        batches = list(read(chunk, ["x"], reject=refuse))
        expected = list(range(300 * i, min(300 * i + 300, 1000)))
        assert [x for rows in batches for x in rows.columns["x"]] == expected
        assert [n for rows in batches for n in rows.numbers] == expected


@pytest.mark.parametrize("newline_at_end", [True, False])
def test_every_line_is_in_one_byte_range(tmp_path: Path, newline_at_end: bool) -> None:
    lines = [json.dumps({"x": i, "pad": "é" * (i * 37 % 50)}, ensure_ascii=False) for i in range(200)]
    lines.insert(20, "")
    content = "\n".join(lines) + "\n" * newline_at_end
    (tmp_path / "x.jsonl").write_text(content)
    offsets = [
        read_at for read_at in range(len(content.encode())) if _begins_a_row(content.encode(), read_at)
    ]
    for target in (7, 40, 64, 1000, 5000, 1 << 20):
        found = chunks([str(tmp_path / "x.jsonl")], target_bytes=target)
        assert len(found) == max(1, round(len(content.encode()) / target))
        rows = [batch for chunk in found for batch in read(chunk, ["x"], reject=refuse, rows_per_batch=3)]
        assert [x for batch in rows for x in batch.columns["x"]] == list(range(200))
        assert [n for batch in rows for n in batch.numbers] == offsets
        assert rows[-1].where(rows[-1].num_rows - 1).endswith("x.jsonl, line 201")


def _begins_a_row(content: bytes, offset: int) -> bool:
    return (offset == 0 or content[offset - 1 : offset] == b"\n") and content[offset : offset + 1] == b"{"


def test_a_bad_row_of_a_later_range_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(f'{{"x": {i}}}\n' if i != 800 else "?\n" for i in range(1000)))
    told = []
    for chunk in chunks([str(file)], target_bytes=1000):
        list(read(chunk, ["x"], reject=lambda where, _: told.append(where)))
    assert told == [f"{file}, line 801"]


def test_many_small_files_make_few_chunks(tmp_path: Path) -> None:
    files = []
    for i in range(2000):
        file = tmp_path / f"{i:04}.jsonl"
        file.write_text(f'{{"x": {i}}}\n')
        files.append(str(file))
    found = chunks(files)
    assert len(found) == 8 and all(chunk.is_bounded and chunk.num_rows is None for chunk in found)
    assert [piece.file for chunk in found for piece in chunk.pieces] == files
    rows = [x for chunk in found for batch in read(chunk, ["x"], reject=refuse) for x in batch.columns["x"]]
    assert rows == list(range(2000))


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    names = ["a.csv", "b.csv", "c.jsonl.gz", "d.jsonl.gz", "e.csv"]
    for name, size in zip(names, (100, 3000, 400, 600, 0), strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
    files = [str(tmp_path / name) for name in names]
    assert chunks(files, target_bytes=1000) == [
        Chunk((Piece(files[0]),), 100, None, True),
        Chunk((Piece(files[1]),), 3000, None, False),
        Chunk((Piece(files[2]),), 1600, None, True),
        Chunk((Piece(files[3]),), 2400, None, False),
    ]
    with pytest.raises(DataError, match="gone.csv: no such file"):
        chunks([str(tmp_path / "gone.csv")])


def test_a_saved_data_set_is_cut_at_batches(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": list(range(5000))}).save_to_disk(tmp_path / "data")
    (file,) = (str(path) for path in (tmp_path / "data").glob("*.arrow"))
    assert [chunk.num_rows for chunk in chunks([file], target_bytes=1000)] == [1000] * 5
