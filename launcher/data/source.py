"""Any format to Arrow batches: the door to pyarrow. Streams; reads headers where headers do."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pyarrow import fs

from launcher.errors import DataError

PARQUET = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".json", ".ndjson")
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of one file: its columns as lists, and where each row stands."""

    file: str
    numbers: range
    columns: dict[str, list[Any]]

    def where(self, i: int) -> str:
        """Name row `i` of this piece for a message, counting from 1."""
        unit = "row" if self.file.endswith(PARQUET) else "line"
        return f"{self.file}, {unit} {self.numbers[i] + 1}"


def list_files(paths: str | list[str]) -> list[str]:
    """Return the files behind files, globs and directories, in the order of their names.

    Raises:
        DataError: nothing is there, or a file is of a kind that cannot be read.
    """
    files = [file for path in ([paths] if isinstance(paths, str) else paths) for file in _expand(path)]
    for file in files:
        if not file.endswith(PARQUET + JSON_LINES):
            raise DataError(f"{file}: only Parquet (.parquet) and JSON lines (.jsonl, .json) can be read")
    return files


def stamp(file: str) -> tuple[int, int]:
    """Return a file's size and time of change, to tell whether it is still the same."""
    info = _open_filesystem(file)[0].get_file_info(_open_filesystem(file)[1])
    return int(info.size or 0), int(info.mtime_ns or 0)


def column_names(files: list[str]) -> list[str]:
    """Return the columns that the files have, from headers (Parquet) or the first line (JSON).

    Raises:
        DataError: a Parquet file cannot be read, or the files do not have the same columns.
    """
    first = _columns_of(files[0])
    for file in files[1:]:
        if file.endswith(PARQUET) and set(_columns_of(file)) != set(first):
            raise DataError(f"{file}: has other columns than {files[0]}: {', '.join(_columns_of(file))}")
    return first


def count_rows(files: list[str]) -> int:
    """Count rows: from the footers of Parquet files, by the ends of lines in JSON."""
    return sum(_count(file) for file in files)


def batches(files: list[str], columns: list[str], rows_per_batch: int = 8192) -> Iterator[Rows]:
    """Yield the files' rows, the given columns only.

    Raises:
        DataError: a file is corrupt; names the line in JSON.
    """
    for file in files:
        reader = _parquet_rows if file.endswith(PARQUET) else _json_rows
        yield from reader(file, columns, rows_per_batch)


def _expand(path: str) -> list[str]:
    if "://" not in path and any(sign in path for sign in "*?["):
        found = sorted(glob(path, recursive=True))
        if not found:
            raise DataError(f"{path}: matches no file")
        return found
    filesystem, inside = _open_filesystem(path)
    info = filesystem.get_file_info(inside)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{path}: no such file{_elsewhere(path)}")
    if info.type == fs.FileType.File:
        return [path]
    below = filesystem.get_file_info(fs.FileSelector(inside, recursive=True))
    prefix = path.split("://")[0] + "://" if "://" in path else ""
    found = sorted(prefix + f.path for f in below if f.path.endswith(PARQUET + JSON_LINES))
    if not found:
        raise DataError(f"{path}: the directory holds no Parquet or JSON-lines file")
    return found


def _elsewhere(path: str) -> str:
    name = Path(path).name
    here = [c for c in (Path.cwd() / name, Path.cwd() / "data" / name) if c.exists()]
    return f" (there is {here[0]}; paths in a recipe are relative to its folder)" if here else ""


def _open_filesystem(path: str) -> tuple[Any, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), path
    try:
        filesystem, inside = fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be reached: {_line(error)}") from None
    return filesystem, inside


def _parquet(file: str) -> pq.ParquetFile:
    filesystem, inside = _open_filesystem(file)
    try:
        return pq.ParquetFile(filesystem.open_input_file(inside))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {_line(error)}") from None


def _columns_of(file: str) -> list[str]:
    if file.endswith(PARQUET):
        return list(_parquet(file).schema_arrow.names)
    with _stream(file) as stream:
        for number, line in enumerate(stream):
            if line.strip():
                return list(_object(line, file, number))
    return []


def _count(file: str) -> int:
    if file.endswith(PARQUET):
        return int(_parquet(file).metadata.num_rows)
    count, last = 0, b"\n"
    with _stream(file) as stream:
        while block := stream.read(BLOCK_BYTES):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _parquet_rows(file: str, columns: list[str], rows_per_batch: int) -> Iterator[Rows]:
    start = 0
    try:
        for batch in _parquet(file).iter_batches(rows_per_batch, columns=columns):
            values = {name: batch.column(name).to_pylist() for name in columns}
            yield Rows(file, range(start, start + batch.num_rows), values)
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}, after row {start}: cannot be read on: {_line(error)}") from None


def _json_rows(file: str, columns: list[str], rows_per_batch: int) -> Iterator[Rows]:
    with _stream(file) as stream:
        start = 0
        while lines := stream.readlines(BLOCK_BYTES):
            for first in range(0, len(lines), rows_per_batch):
                part = lines[first : first + rows_per_batch]
                yield from _parse(part, file, start + first, columns)
            start += len(lines)


def _parse(lines: list[bytes], file: str, start: int, columns: list[str]) -> Iterator[Rows]:
    """Parse lines in Arrow; where it refuses, or lines are blank, one by one to find the reason."""
    numbers = range(start, start + len(lines))
    try:
        options = pa_json.ReadOptions(block_size=BLOCK_BYTES * 4)
        table = pa_json.read_json(io.BytesIO(b"".join(lines)), read_options=options)
    except pa.ArrowException:
        table = None
    if table is not None and table.num_rows == len(lines):
        empty = [None] * len(lines)
        has = table.column_names
        yield Rows(file, numbers, {c: table.column(c).to_pylist() if c in has else empty for c in columns})
        return
    for number, line in zip(numbers, lines, strict=True):
        if line.strip():
            row = _object(line, file, number)
            yield Rows(file, range(number, number + 1), {name: [row.get(name)] for name in columns})


def _object(line: bytes, file: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number + 1}: not valid JSON: {_line(error)}") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}, line {number + 1}: not a JSON object, but {type(row).__name__}")
    return row


def _stream(file: str) -> io.BufferedReader:
    filesystem, inside = _open_filesystem(file)
    return io.BufferedReader(filesystem.open_input_file(inside))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
