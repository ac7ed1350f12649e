"""JSON Lines: byte ranges of a file as lines, and a line as an object.

Lines are parsed by `json`, not by `pyarrow.json`: that one turns strings that look like dates into
timestamps, and fills nested objects with keys that the line does not have.
"""

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launcher.data import formats, places
from launcher.errors import DataError

_BUFFER_BYTES = 4 << 20
_PEEK_BYTES = 1 << 20
_PEEK_ROWS = 100
# To name a line, all before it are counted; past this, the byte must do. By whether the file is remote.
_MOST_BYTES_COUNTED = {True: 64 << 20, False: 1 << 30}

_decode = json.JSONDecoder().decode


class LineNumbers:
    """Tells the line of a byte offset in one file, counting on from where it was last asked."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._offset = 0
        self._lines = 0

    def where(self, offset: int) -> str:
        """Return `<file>, line 8`, or the byte where lines cannot be counted."""
        try:
            limit = _MOST_BYTES_COUNTED[places.is_remote(self._file)]
            if offset <= limit and self._count_to(offset):
                return f"{places.shown(self._file)}, line {self._lines + 1}"
        except DataError:
            pass  # the message is about the row, not about counting
        return f"{places.shown(self._file)}, the line at byte {offset + 1}"

    def _count_to(self, offset: int) -> bool:
        if offset < self._offset:
            self._offset = self._lines = 0
        is_packed = formats.compression(self._file) is not None
        with _open(self._file, 0 if is_packed else self._offset) as opened:
            if is_packed:
                _skip(opened, self._offset)
            while self._offset < offset:
                block = opened.read(min(_BUFFER_BYTES, offset - self._offset))
                if not block:
                    return False
                self._lines += block.count(b"\n")
                self._offset += len(block)
        return True


def batches(
    file: str, start: int, stop: int | None, rows_per_batch: int
) -> Iterator[tuple[list[bytes], list[int]]]:
    """Read the lines that begin in bytes `start` to `stop`.

    Yields:
        Lines, blank ones included, and the byte offset of each (of a compressed file: once unpacked).

    Raises:
        DataError: the file is not readable.
    """
    with _open(file, max(start - 1, 0)) as opened:
        offset = start
        if start > 0:  # a line belongs to the range that holds its first byte
            offset = start - 1 + len(opened.readline())
        while stop is None or offset < stop:
            wanted = _BUFFER_BYTES if stop is None else min(_BUFFER_BYTES, stop - offset)
            lines = opened.readlines(wanted)  # whole lines, just past `wanted` bytes
            if not lines:
                return
            *offsets, offset = itertools.accumulate(map(len, lines), initial=offset)
            if stop is not None and offsets[-1] >= stop:
                lines.pop()
                offsets.pop()
            for i in range(0, len(lines), rows_per_batch):
                yield lines[i : i + rows_per_batch], offsets[i : i + rows_per_batch]


def parse(line: bytes, offset: int) -> dict[str, Any]:
    """Return the object of one line.

    Raises:
        ValueError: there is none; says why.
    """
    try:
        value = _decode(line.rstrip().decode("utf-8" if offset else "utf-8-sig"))
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start + 1}"
    except RecursionError:
        why = "nested too deeply"
    else:
        if isinstance(value, dict):
            return value
        why = "not an object"
    spread = line.lstrip().startswith(b"[") or line.strip() == b"{"
    advice = "; the file is read line by line, one JSON object on each, not as one array" if spread else ""
    raise ValueError(f"not valid JSON: {why}{advice}")


def first_names(file: str) -> list[str]:
    """Return the keys of the first lines, in order of appearance; empty if the file has no line.

    Raises:
        DataError: none of the first lines is an object.
    """
    names: dict[str, None] = {}
    first_error: DataError | None = None
    for line, offset in _first_lines(file):
        try:
            names.update(dict.fromkeys(parse(line, offset)))
        except ValueError as error:
            first_error = first_error or DataError(f"{LineNumbers(file).where(offset)}: {error}")
    if first_error is not None and not names:
        raise first_error
    return list(names)


def _first_lines(file: str) -> Iterator[tuple[bytes, int]]:
    with _open(file, 0) as opened:
        block = opened.read(_PEEK_BYTES)
        is_whole = len(block) < _PEEK_BYTES
        # A file that is one array may be one line of many GiB: its beginning says enough.
        if not is_whole and b"\n" not in block and not block.lstrip().startswith(b"["):
            block += opened.readline()
    lines = [line + b"\n" for line in block.split(b"\n")]
    if not is_whole and len(lines) > 1:
        lines.pop()
    offsets = itertools.accumulate(map(len, lines), initial=0)
    rows = ((line, offset) for line, offset in zip(lines, offsets, strict=False) if line.strip())
    yield from itertools.islice(rows, _PEEK_ROWS)


def _skip(opened: io.BufferedReader, count: int) -> None:
    while count > 0:
        block = opened.read(min(_BUFFER_BYTES, count))
        if not block:
            return
        count -= len(block)


@contextmanager
def _open(file: str, start: int) -> Iterator[io.BufferedReader]:
    # A compressed file can only be read from its beginning.
    open_it = places.open_file if formats.compression(file) is None else places.open_stream
    with open_it(file) as raw:
        if start:
            raw.seek(start)
        yield io.BufferedReader(raw, _BUFFER_BYTES)
