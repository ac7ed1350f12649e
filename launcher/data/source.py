"""The user's files, read as a stream of rows; the public face of what reads them.

Formats: Parquet, Arrow IPC, JSON lines, CSV, and what `datasets` keeps; on a disk, in an object store, or from
the hub. Every error names the file and, where there is one, the row, the row group or the line.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from launcher.data import csv_files, filters, formats, json_lines, places, tables
from launcher.data.chunks import Chunk, Piece, chunks, count_rows
from launcher.data.columns import check_filters, column_names, of_file
from launcher.data.filters import Filter
from launcher.data.json_lines import LineNumbers
from launcher.data.paths import list_files
from launcher.data.places import stamp
from launcher.errors import DataError

__all__ = [
    "Chunk",
    "Piece",
    "Rows",
    "check_filters",
    "chunks",
    "column_names",
    "count_rows",
    "list_files",
    "read",
    "refuse",
    "stamp",
]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one file, in its order.

    Attributes:
        file: path or URI of the file.
        columns: values by column name; all lists have the same length.
        numbers: 0-based row of each; for JSON lines the byte at which its line begins.
    """

    file: str
    columns: dict[str, list[Any]]
    numbers: Sequence[int]
    _lines: LineNumbers | None = field(default=None, compare=False, repr=False)

    @property
    def num_rows(self) -> int:
        """How many rows these are."""
        return len(self.numbers)

    def where(self, i: int) -> str:
        """Return the place of row `i` of these rows, for a message: `<file>, row 7` or `<file>, line 7`.

        For JSON lines this reads the file up to there.
        """
        return _place(self.file, self.numbers[i], self._lines)


def refuse(where: str, reason: str) -> NoReturn:
    """Raise DataError: the `reject` of who wants every row."""
    raise DataError(f"{where}: {reason}")


def read(
    chunk: Chunk,
    columns: list[str],
    *,
    filters: Sequence[Filter] | None = None,
    part: tuple[float, float] | None = None,
    reject: Callable[[str, str], None],
    rows_per_batch: int = 2048,
) -> Iterator[Rows]:
    """Read the rows of a chunk, in order.

    Args:
        chunk: one that `chunks` returned.
        columns: names of the columns wanted; a row that lacks one yields None for it.
        filters: `[column, operator, value]` each; a row must pass all.
        part: `(low, high)` within 0 to 1: keep the rows whose hash is there. Parts that do not overlap have no
            row in common, on whatever machine.
        reject: is told the place and the reason for every row that cannot be read; raises, or the row is left
            out.
        rows_per_batch: rows of a batch, at most.

    Yields:
        Rows with every one of `columns`, plain Python values; never none.

    Raises:
        DataError: a file cannot be read, or a filter does not fit it.
    """
    for piece in chunk.pieces:
        read_piece = _read_json if formats.kind(piece.file) == "json" else _read_table
        for rows in read_piece(piece, columns, list(filters or ()), part, reject, rows_per_batch):
            if rows.num_rows:
                yield rows


def _place(file: str, number: int, lines: LineNumbers | None = None) -> str:
    if formats.kind(file) == "json":
        return (lines or LineNumbers(file)).where(number)
    return f"{places.shown(file)}, row {number + 1}"


def _read_json(
    piece: Piece,
    columns: list[str],
    wanted: list[Filter],
    part: tuple[float, float] | None,
    reject: Callable[[str, str], None],
    rows_per_batch: int,
) -> Iterator[Rows]:
    file, lines_before = piece.file, LineNumbers(piece.file)
    named = filters.columns(wanted)
    for lines, offsets in json_lines.batches(file, piece.start, piece.stop, rows_per_batch):
        chosen: Iterable[tuple[bytes, int]] = zip(lines, offsets, strict=True)
        if part is not None:
            kept = filters.in_part(file, offsets, part).nonzero()[0].tolist()
            chosen = ((lines[i], offsets[i]) for i in kept)
        found: list[dict[str, Any]] = []
        numbers: list[int] = []
        for line, offset in chosen:
            if line.isspace():
                continue
            try:
                row = json_lines.parse(line, offset)
            except ValueError as error:
                reject(lines_before.where(offset), str(error))
            else:
                found.append(row)
                numbers.append(offset)
        if wanted:
            held = {name: [row.get(name) for row in found] for name in named}
            kept = filters.kept(file, wanted, held, len(found)).tolist()
            found, numbers = [found[i] for i in kept], [numbers[i] for i in kept]
        values = {name: [row.get(name) for row in found] for name in columns}
        yield Rows(file, values, numbers, lines_before)


def _read_table(
    piece: Piece,
    columns: list[str],
    wanted: list[Filter],
    part: tuple[float, float] | None,
    reject: Callable[[str, str], None],
    rows_per_batch: int,
) -> Iterator[Rows]:
    file = piece.file
    named = filters.columns(wanted)
    needed = list(dict.fromkeys([*columns, *named]))
    if formats.kind(file) == "csv":
        batches = csv_files.batches(file, needed, rows_per_batch)
    else:
        batches = tables.batches(file, piece.start, piece.stop, needed, rows_per_batch)
    for batch in batches:
        for number, reason in batch.bad:
            if part is None or filters.in_part(file, [number], part)[0]:
                reject(_place(file, number), reason)
        _check_named(named, wanted, batch, file)
        kept = _kept(file, batch, wanted, part)
        yield _rows(file, batch, columns, kept, reject)


def _check_named(named: list[str], wanted: list[Filter], batch: tables.Batch, file: str) -> None:
    if len(batch.numbers) and any(name not in batch.columns for name in named):
        filters.check(file, wanted, of_file(file).types)


def _kept(
    file: str, batch: tables.Batch, wanted: list[Filter], part: tuple[float, float] | None
) -> np.ndarray:
    kept = filters.kept(file, wanted, batch.columns, len(batch.numbers))
    if part is None:
        return kept
    return kept[filters.in_part(file, batch.numbers[kept], part)]


def _rows(
    file: str,
    batch: tables.Batch,
    columns: list[str],
    kept: np.ndarray,
    reject: Callable[[str, str], None],
) -> Rows:
    is_whole = len(kept) == len(batch.numbers)
    numbers = batch.numbers[kept].tolist()
    values: dict[str, list[Any]] = {}
    bad: dict[int, str] = {}
    for name in columns:
        array = batch.columns.get(name)
        if array is None:
            values[name] = [None] * len(numbers)
            continue
        values[name], reasons = tables.values(array if is_whole else array.take(kept))
        for i, reason in reasons.items():
            bad.setdefault(i, f'column "{name}": {reason}')
    for i, reason in sorted(bad.items()):
        reject(_place(file, numbers[i]), reason)
    if bad:
        good = [i for i in range(len(numbers)) if i not in bad]
        numbers = [numbers[i] for i in good]
        values = {name: [column[i] for i in good] for name, column in values.items()}
    return Rows(file, values, numbers)
