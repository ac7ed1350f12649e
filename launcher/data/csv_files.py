"""CSV and TSV files: typed by their first block, read in batches of columns, bad rows told one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from launcher.data import formats, places
from launcher.data.tables import Batch
from launcher.errors import DataError

_SAMPLE_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20  # no row may be longer
_LONGEST_SHOWN = 80


def schema(file: str) -> pa.Schema:
    """Return the names of the header and the types of the first block: text, int64, double, bool or null.

    Dates are text here: what a tokenizer reads must come as it was written. An empty file has no columns.

    Raises:
        DataError: the file is not readable.
    """
    for block_bytes in (_SAMPLE_BYTES, _BLOCK_BYTES):
        try:
            with _open(file, {}, [], [], block_bytes) as reader:
                found = reader.schema if reader is not None else pa.schema([])
                return pa.schema([(field.name, _kept(field.type)) for field in found])
        except DataError as error:
            if block_bytes == _BLOCK_BYTES or "straddl" not in str(error):
                raise _named(error) from None
    raise AssertionError("the loop ends by return or raise")


def batches(file: str, columns: Sequence[str], rows_per_batch: int) -> Iterator[Batch]:
    """Read a CSV file; a row with too many or too few fields, or a value of another type, is told as bad.

    Raises:
        DataError: the file is not readable.
    """
    types = {field.name: field.type for field in schema(file)}
    if not types:
        return
    held = [name for name in columns if name in types]
    invalid: list[Any] = []
    next_row = 0
    # Values are read as they are and typed here, so that one bad value costs one row, not the file.
    raw_types = {name: pa.binary() for name in types}
    try:
        with _open(file, raw_types, held or list(types)[:1], invalid, _BLOCK_BYTES) as reader:
            for batch in reader or ():
                numbers = _numbers(next_row, batch.num_rows, invalid)
                next_row = int(numbers[-1]) + 1 if len(numbers) else next_row
                yield _told(invalid, next_row)
                for start in range(0, batch.num_rows, rows_per_batch):
                    part = slice(start, start + rows_per_batch)
                    raw = {name: batch.column(name)[part] for name in held}
                    yield _typed(numbers[part], raw, types)
    except DataError as error:
        raise _named(error) from None
    yield _told(invalid, None)


@contextmanager
def _open(
    file: str, types: dict[str, pa.DataType], names: list[str], invalid: list[Any], block_bytes: int
) -> Iterator[csv.CSVStreamingReader | None]:
    def set_aside(row: Any) -> str:
        invalid.append(row)
        return "skip"

    with places.open_stream(file) as raw, places.failures(file, "not a readable CSV file"):
        try:
            reader = csv.open_csv(
                raw,
                # Only one thread numbers the rows that it sets aside.
                csv.ReadOptions(use_threads=False, block_size=block_bytes),
                csv.ParseOptions(
                    delimiter=formats.delimiter(file),
                    newlines_in_values=True,
                    invalid_row_handler=set_aside,
                ),
                csv.ConvertOptions(column_types=types, include_columns=names),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):
                raise
            reader = None
        yield reader


def _named(error: DataError) -> DataError:
    message = str(error)
    if "straddl" not in message:
        return error
    file = message.partition(": not a readable")[0]
    size = _BLOCK_BYTES >> 20
    return DataError(
        f"{file}: a row is longer than {size} MiB; is a quote left open, or the delimiter another?"
    )


def _kept(kind: pa.DataType) -> pa.DataType:
    is_plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return kind if is_plain or pa.types.is_null(kind) else pa.string()


def _numbers(first: int, count: int, invalid: list[Any]) -> np.ndarray:
    # Rows of the file are numbered with the invalid ones; pyarrow numbers from 1 and counts the header.
    rows = np.arange(first, first + count + len(invalid), dtype=np.int64)
    return rows[~np.isin(rows, [row.number - 2 for row in invalid])][:count]


def _told(invalid: list[Any], before: int | None) -> Batch:
    # Takes those rows out of `invalid`; the reader may be ahead of the rows that it has given.
    due = [row for row in invalid if before is None or row.number - 2 < before]
    del invalid[: len(due)]
    return Batch(np.empty(0, np.int64), {}, tuple((row.number - 2, _field_count(row)) for row in due))


def _field_count(row: Any) -> str:
    text = row.text if len(row.text) <= _LONGEST_SHOWN else row.text[:_LONGEST_SHOWN] + "..."
    return f"{row.actual_columns} fields where the header has {row.expected_columns}: {text!r}"


def _typed(
    numbers: np.ndarray,
    raw: dict[str, pa.Array],
    types: dict[str, pa.DataType],
) -> Batch:
    columns: dict[str, pa.Array] = {}
    wrong: dict[int, str] = {}
    bad: tuple[tuple[int, str], ...] = ()
    for name, array in raw.items():
        columns[name], reasons = _cast(array, types[name])
        for i, reason in reasons.items():
            wrong.setdefault(i, f'column "{name}": {reason}')
    if wrong:
        bad = tuple((int(numbers[i]), reason) for i, reason in sorted(wrong.items()))
        kept = pa.array([i for i in range(len(numbers)) if i not in wrong], pa.int64())
        columns = {name: array.take(kept) for name, array in columns.items()}
        numbers = numbers[kept.to_numpy()]
    return Batch(numbers, columns, bad)


def _cast(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    try:
        return _cast_all(array, kind), {}
    except pa.ArrowInvalid:
        parts, bad = [], {}
        for i in range(len(array)):
            try:
                parts.append(_cast_all(array[i : i + 1], kind))
            except pa.ArrowInvalid:
                text = array[i].as_py()
                shown = text.decode(errors="replace")[:_LONGEST_SHOWN]
                is_text = _is_utf8(text)
                bad[i] = f'"{shown}" is not {_word(kind)}' if is_text else f'not UTF-8: "{shown}"'
                parts.append(pa.nulls(1, pa.string() if pa.types.is_null(kind) else kind))
        return pa.concat_arrays(parts), bad


def _cast_all(array: pa.Array, kind: pa.DataType) -> pa.Array:
    text = array.cast(pa.string())
    if pa.types.is_string(kind):
        return text
    if pa.types.is_null(kind):  # nothing in the first block: text, where there is some later on
        return pc.if_else(pc.equal(text, ""), None, text)
    text = pc.utf8_trim_whitespace(text)
    empty = pc.is_in(text, pa.array(csv.ConvertOptions().null_values))
    return pc.if_else(empty, None, text).cast(kind)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _word(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "true or false, like the values before it"
    return "a whole number, like the values before it" if pa.types.is_integer(kind) else "a number"
