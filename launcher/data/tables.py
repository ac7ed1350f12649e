"""Parquet and Arrow IPC files: what their headers say, and their rows in batches of columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from launcher.data import formats, places

_MAGIC = b"ARROW1"
# What a value that cannot become a Python object raises: bad UTF-8, a year 12000.
_BAD_VALUE = (ValueError, OverflowError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file that can be read without the others."""

    num_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: row groups of Parquet, record batches of Arrow.

    Attributes:
        schema: its columns.
        parts: its parts in order; None for a remote IPC stream, which can only be read from its beginning.
    """

    schema: pa.Schema
    parts: tuple[Part, ...] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of one file.

    Attributes:
        numbers: 0-based row in the file of each.
        columns: by name, of those asked for that the file has.
        bad: rows that could not be read, and why; they are not among `numbers`.
    """

    numbers: np.ndarray
    columns: dict[str, pa.Array]
    bad: tuple[tuple[int, str], ...] = ()


def header(file: str) -> Header:
    """Return what a Parquet or Arrow file says of itself.

    Raises:
        DataError: it is not readable.
    """
    return _parquet_header(file) if formats.kind(file) == "parquet" else _ipc_header(file)


def schema(file: str) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file.

    Raises:
        DataError: it is not readable.
    """
    if formats.kind(file) == "parquet":
        with _parquet(file) as opened:
            return opened.schema_arrow
    with _ipc(file, None) as (reader, _):
        return reader.schema


def estimate_rows(file: str) -> int:
    """Return about how many rows a remote IPC stream has, from its first batch."""
    with _ipc(file, None) as (reader, _), places.failures(file, "not a readable Arrow file"):
        batch = next(iter(reader), None)
    if batch is None:
        return 0
    return max(1, round(places.size(file) * batch.num_rows / max(1, batch.nbytes)))


def batches(
    file: str, start: int, stop: int | None, columns: Sequence[str], rows_per_batch: int
) -> Iterator[Batch]:
    """Read parts `start` to `stop` of a Parquet or Arrow file.

    Raises:
        DataError: a part is not readable; names it.
    """
    read = _parquet_batches if formats.kind(file) == "parquet" else _ipc_batches
    return read(file, start, stop, columns, rows_per_batch)


def values(column: pa.Array) -> tuple[list[Any], dict[int, str]]:
    """Return a column as Python values, and the reason for each that could not become one (then None)."""
    try:
        return column.to_pylist(), {}
    except _BAD_VALUE:
        found: list[Any] = []
        bad: dict[int, str] = {}
        for i, value in enumerate(column):
            try:
                found.append(value.as_py())
            except _BAD_VALUE as error:
                found.append(None)
                bad[i] = places.reason(error)
                if isinstance(error, UnicodeDecodeError):
                    bad[i] = f"not UTF-8 at byte {error.start + 1}"
        return found, bad


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    with places.open_file(file) as raw, places.failures(file, "not a readable Parquet file"):
        yield pq.ParquetFile(raw, pre_buffer=places.is_remote(file), page_checksum_verification=True)


def _parquet_header(file: str) -> Header:
    with _parquet(file) as opened:
        groups = (opened.metadata.row_group(i) for i in range(opened.num_row_groups))
        return Header(
            opened.schema_arrow, tuple(Part(group.num_rows, group.total_byte_size) for group in groups)
        )


def _parquet_batches(
    file: str, start: int, stop: int | None, columns: Sequence[str], rows_per_batch: int
) -> Iterator[Batch]:
    with _parquet(file) as opened:
        held = [name for name in columns if name in opened.schema_arrow.names]
        count = opened.num_row_groups
        row = sum(opened.metadata.row_group(i).num_rows for i in range(start))
        for group in range(start, count if stop is None else stop):
            place = f"not a readable Parquet file: row group {group + 1} of {count}"
            # One group at a time: an error then has a place, and memory holds one group.
            read = opened.iter_batches(rows_per_batch, row_groups=[group], columns=held)
            with places.failures(file, place):
                for batch in read:
                    yield _batch(batch, row, held)
                    row += batch.num_rows


@contextmanager
def _ipc(file: str, columns: Sequence[str] | None) -> Iterator[tuple[Any, bool]]:
    # Yields a reader and whether its batches can be picked; with columns, it reads those alone.
    with places.open_file(file) as raw, places.failures(file, "not a readable Arrow file"):
        is_file = raw.read(len(_MAGIC)) == _MAGIC
        start = ipc.open_file if is_file else ipc.open_stream
        raw.seek(0)
        reader = start(raw)
        if columns is not None:
            names = reader.schema.names
            picked = [names.index(name) for name in columns if name in names] or [_smallest(reader.schema)]
            raw.seek(0)
            # An empty list would mean all of them.
            reader = start(raw, options=ipc.IpcReadOptions(included_fields=picked if names else []))
        yield reader, is_file


def _smallest(schema: pa.Schema) -> int:
    # The field that is cheapest to decompress or fetch where only rows are counted.
    return next((i for i, field in enumerate(schema) if pa.types.is_primitive(field.type)), 0)


def _ipc_header(file: str) -> Header:
    num_bytes = places.size(file)
    with _ipc(file, None) as (reader, is_file):
        schema = reader.schema
        if not is_file and places.is_remote(file):
            return Header(schema, None)
    counts = [batch.num_rows for batch in _ipc_read(file, 0, None, ())]
    return Header(schema, tuple(Part(rows, num_bytes // len(counts)) for rows in counts))


def _ipc_read(file: str, start: int, stop: int | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # Batches before `start` come too, for their number of rows; a mapped file is not read for that.
    with _ipc(file, columns) as (reader, is_file):
        if is_file:
            count = reader.num_record_batches
            end = count if stop is None else min(stop, count)
            batches_of_file = (reader.get_batch(i) for i in range(end))
        else:
            batches_of_file = iter(reader)
        index = 0
        while stop is None or index < stop:
            with places.failures(file, f"not a readable Arrow file: record batch {index + 1}"):
                batch = next(batches_of_file, None)
                if batch is None:
                    return
                if index >= start:
                    batch.validate()  # offsets that point outside would crash the process
            yield batch
            index += 1


def _ipc_batches(
    file: str, start: int, stop: int | None, columns: Sequence[str], rows_per_batch: int
) -> Iterator[Batch]:
    row = 0
    for index, batch in enumerate(_ipc_read(file, start, stop, columns)):
        if index >= start:
            held = [name for name in columns if name in batch.schema.names]
            for offset in range(0, batch.num_rows, rows_per_batch):
                yield _batch(batch.slice(offset, rows_per_batch), row + offset, held)
        row += batch.num_rows


def _batch(batch: pa.RecordBatch, row: int, held: Sequence[str]) -> Batch:
    numbers = np.arange(row, row + batch.num_rows, dtype=np.int64)
    return Batch(numbers, {name: batch.column(name) for name in held})
