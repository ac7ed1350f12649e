"""The files cut into pieces of work of about one size, and how many rows there are: from headers and sizes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.data import formats, places, tables

_MOST_PIECES = 256  # each is a file to open
_UNPACKED_PER_PACKED = 4
_SAMPLE_BYTES = 1 << 20
_MOST_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one file.

    Attributes:
        file: path or URI.
        start: Parquet: row group; Arrow: record batch; JSON lines: byte, a line is where it begins.
        stop: exclusive; None: to the end.
    """

    file: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one task of the preparation reads.

    Attributes:
        pieces: in order.
        num_bytes: about; uncompressed where that is known.
        num_rows: exact where headers say so; else None.
        is_bounded: False for what cannot be split and is much larger than was asked for.
    """

    pieces: tuple[Piece, ...]
    num_bytes: int
    num_rows: int | None
    is_bounded: bool


def chunks(files: Sequence[str], target_bytes: int = 8 << 20) -> list[Chunk]:
    """Cut files into chunks of about `target_bytes`, in order: a pure function of the files.

    Raises:
        DataError: a file is missing, or its header is not readable.
    """
    cut: list[Chunk] = []
    for pieces in places.for_each(files, lambda file: _pieces(file, target_bytes)):
        cut += pieces
    merged: list[Chunk] = []
    group: list[Chunk] = []
    for chunk in cut:
        size = sum(one.num_bytes for one in group)
        # Up to the size closest to the target.
        is_full = size + chunk.num_bytes // 2 > target_bytes or len(group) == _MOST_PIECES
        if group and (is_full or not chunk.is_bounded or not group[-1].is_bounded):
            merged.append(_merge(group))
            group = []
        group.append(chunk)
    return [*merged, _merge(group)] if group else merged


def count_rows(files: Sequence[str]) -> tuple[int, bool]:
    """Return the number of rows and whether it is exact.

    Headers of Parquet and Arrow files say it. Of text files the first MiB is counted, of many files of a few:
    the rest is estimated from the sizes.

    Raises:
        DataError: a file is missing, or its header is not readable.
    """
    typed = [file for file in files if formats.kind(file) in ("parquet", "arrow")]
    texts = [file for file in files if formats.kind(file) in ("json", "csv")]
    headers = places.for_each(typed, tables.header)
    num_rows = sum(part.num_rows for header in headers for part in header.parts or ())
    unknown = [file for file, header in zip(typed, headers, strict=True) if header.parts is None]
    streams = places.for_each(unknown, tables.estimate_rows)
    num_rows, is_exact = num_rows + sum(streams), not streams
    for kind in sorted({_sort_of(file) for file in texts}):
        estimate, is_count = _count_text([file for file in texts if _sort_of(file) == kind])
        num_rows, is_exact = num_rows + estimate, is_exact and is_count
    return num_rows, is_exact


def _pieces(file: str, target_bytes: int) -> list[Chunk]:
    kind = formats.kind(file)
    if kind in ("parquet", "arrow"):
        parts = tables.header(file).parts
        if parts is not None:
            return [
                Chunk(
                    (Piece(file, i, i + 1),),
                    part.num_bytes,
                    part.num_rows,
                    part.num_bytes <= 2 * target_bytes,
                )
                for i, part in enumerate(parts)
                if part.num_rows
            ]
    size = places.size(file)
    if size == 0:
        return []
    if formats.compression(file) is not None:
        return [Chunk((Piece(file),), size * _UNPACKED_PER_PACKED, None, size <= target_bytes // 2)]
    if kind != "json":
        return [Chunk((Piece(file),), size, None, size <= 2 * target_bytes)]
    count = max(1, round(size / target_bytes))
    cuts = [size * i // count for i in range(count + 1)]
    return [
        Chunk((Piece(file, start, stop),), stop - start, None, True)
        for start, stop in itertools.pairwise(cuts)
    ]


def _merge(group: list[Chunk]) -> Chunk:
    pieces: list[Piece] = []
    for piece in (piece for chunk in group for piece in chunk.pieces):
        if pieces and pieces[-1].file == piece.file and pieces[-1].stop == piece.start:
            piece = Piece(piece.file, pieces.pop().start, piece.stop)
        pieces.append(piece)
    rows = [chunk.num_rows for chunk in group]
    return Chunk(
        pieces=tuple(pieces),
        num_bytes=sum(chunk.num_bytes for chunk in group),
        num_rows=None if None in rows else sum(row for row in rows if row is not None),
        is_bounded=all(chunk.is_bounded for chunk in group),
    )


def _sort_of(file: str) -> tuple[str, str]:
    # Files of one sort have about as many bytes a row.
    return formats.kind(file), formats.compression(file) or ""


def _count_text(files: list[str]) -> tuple[int, bool]:
    step = -(-len(files) // _MOST_SAMPLES)
    asked = files[::step]
    samples = places.for_each(asked, _sample)
    counted = sum(rows for rows, _, _ in samples)
    if len(asked) == len(files) and all(is_whole for _, _, is_whole in samples):
        return counted, True
    num_bytes = sum(places.for_each(files, places.size))
    return max(1, round(num_bytes * counted / max(1, sum(share for _, share, _ in samples)))), False


def _sample(file: str) -> tuple[int, int, bool]:
    start = places.read_start(file, _SAMPLE_BYTES)
    lines = start.content.split(b"\n")
    if formats.kind(file) == "json":
        rows = sum(1 for line in lines if line.strip())
    else:
        rows = max(0, _num_records(lines) - 1)
    return rows, start.share, start.is_whole


def _num_records(lines: list[bytes]) -> int:
    # A field in quotes may hold newlines; a quote inside it is written twice.
    count, is_open = 0, False
    for line in lines:
        count += not is_open and bool(line.strip())
        is_open ^= line.count(b'"') % 2 == 1
    return count
