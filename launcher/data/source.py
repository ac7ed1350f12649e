"""The user's files, read as a stream of rows: Parquet and JSON Lines, on a disk or in an object store.

Every error names the file and, where there is one, the row or line. JSON lines are parsed by `json`, not
by `pyarrow.json`: that one turns strings that look like dates into timestamps, and fills nested objects
with keys that the line does not have.
"""

import fnmatch
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from launcher.errors import DataError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (".parquet", *_JSON_SUFFIXES)
_READABLE = "a data file ends in .parquet, .jsonl, .ndjson or .json"
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one file.

    Attributes:
        file: path or URI of the file.
        first_row: 0-based row (JSON Lines: line, blank ones included) of the first row held here.
        columns: values by column name; all lists have the same length.
        lines: JSON Lines only: the 1-based line of each row (blank lines make gaps).
    """

    file: str
    first_row: int
    columns: dict[str, list[Any]]
    lines: Sequence[int] = ()

    def where(self, i: int) -> str:
        """Return the place of row `i` of these rows, for a message: `<file>, row 7`."""
        if self.lines:
            return f"{self.file}, line {self.lines[i]}"
        return f"{self.file}, {'line' if _is_json(self.file) else 'row'} {self.first_row + i + 1}"


def list_files(paths: str | list[str]) -> list[str]:
    """Return the data files that files, globs and directories stand for, in the order of `paths`.

    Args:
        paths: local absolute paths or URIs (s3://, gs://). What a directory or a glob holds is sorted
            by name; a directory's own files only, hidden ones (`.`, `_`) left out.

    Returns:
        Paths or URIs, as many as there are files, at least one per given path.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        # In a URI, "?" begins the query.
        wildcard = re.search(r"\*" if "://" in path else r"[*?[]", path)
        if wildcard and not os.path.exists(path):
            files += _matches(path, wildcard.start())
        else:
            files += _files_at(path)
    return files


def stamp(file: str) -> tuple[int, int]:
    """Return a file's size in bytes and its time of change in ns, to tell whether it is still the same."""
    system, inner = pafs.FileSystem.from_uri(file) if "://" in file else (pafs.LocalFileSystem(), file)
    info = system.get_file_info(inner)
    return int(info.size or 0), int(info.mtime_ns or 0)


def column_names(files: list[str]) -> list[str]:
    """Return the columns: of the first file's Parquet schema, or of its first JSON line.

    Raises:
        DataError: a Parquet file is not readable, or its columns differ from those of the others.
    """
    schemas: dict[str, list[str]] = {}
    for file in (file for file in files if not _is_json(file)):
        with _parquet(file) as opened:
            names = schemas[file] = list(opened.schema_arrow.names)
        first_file, first = next(iter(schemas.items()))
        if set(names) != set(first):
            raise DataError(
                f"{file}: its columns ({', '.join(names)}) are not those of {first_file} ({', '.join(first)})"
            )
    if files[0] in schemas:
        return schemas[files[0]]
    first_row = next(_json_rows(files[0]), None)
    return list(first_row[1]) if first_row else []


def count_rows(files: list[str]) -> int:
    """Return the rows of all files: from Parquet footers, and by counting JSON lines that are not blank."""
    count = 0
    for file in files:
        if _is_json(file):
            with _json_lines(file) as lines:
                count += sum(1 for line in lines if not line.isspace())
        else:
            with _parquet(file) as opened:
                count += opened.metadata.num_rows
    return count


def batches(files: list[str], columns: list[str], rows_per_batch: int = 8192) -> Iterator[Rows]:
    """Stream the rows of all files, in order; no batch crosses from one file to the next.

    Args:
        files: what `list_files` returned.
        columns: names of the columns wanted; a row that lacks one yields None for it.
        rows_per_batch: rows of a batch, at most.

    Yields:
        Rows with every one of `columns`, plain Python values.
    """
    for file in files:
        read = _json_batches if _is_json(file) else _parquet_batches
        yield from read(file, columns, rows_per_batch)


def _is_json(file: str) -> bool:
    return _suffix(file) in _JSON_SUFFIXES


def _suffix(file: str) -> str:
    return PurePosixPath(_without_query(file)).suffix.lower()


def _without_query(path: str) -> str:
    return path.split("?")[0] if "://" in path else path


def _locate(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        system, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a place that can be read: {_reason(error)}") from None
    return system, inner


def _renamed(uri: str, path: str, other: str) -> str:
    # The URI of `other`, a path in the same file system; keeps credentials, host and query.
    if "://" not in uri:
        return other
    bare, path = _without_query(uri), path.rstrip("/")
    head, found, _ = bare.rstrip("/").rpartition(path)
    return (head if found else bare.split("://")[0] + "://") + other + uri[len(bare) :]


def _files_at(path: str) -> list[str]:
    system, inner = _locate(path)
    try:
        kind = system.get_file_info(inner).type
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from None
    if kind == pafs.FileType.NotFound:
        raise DataError(f"{path}: no such file{_hint(path)}")
    if kind == pafs.FileType.Directory:
        found = [file for file in _listing(system, inner, path, recursive=False) if _is_data(file)]
        if not found:
            raise DataError(f"{path}: the directory holds no data file; {_READABLE}")
        return [_renamed(path, inner, file) for file in found]
    if _suffix(path) not in _SUFFIXES:
        raise DataError(f"{path}: cannot be read; {_READABLE}")
    return [path]


def _matches(pattern: str, wildcard: int) -> list[str]:
    root = pattern[:wildcard].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")
    wanted = pattern[len(root) :].strip("/").split("/")
    system, inner = _locate(root)
    listed = _listing(system, inner, pattern, recursive=len(wanted) > 1 or wanted == ["**"])
    found = [file for file in listed if _glob_match(file.removeprefix(inner).strip("/").split("/"), wanted)]
    if not found:
        raise DataError(f"{pattern}: no such file{_hint(root)}")
    readable = [file for file in found if _is_data(file)]
    if not readable:
        raise DataError(f"{pattern}: none of the {len(found)} files found can be read; {_READABLE}")
    return [_renamed(root, inner, file) for file in readable]


def _glob_match(names: list[str], wanted: list[str]) -> bool:
    if not names or not wanted:
        return not names and wanted in ([], ["**"])
    if wanted[0] == "**":
        return _glob_match(names, wanted[1:]) or _glob_match(names[1:], wanted)
    return fnmatch.fnmatchcase(names[0], wanted[0]) and _glob_match(names[1:], wanted[1:])


def _is_data(file: str) -> bool:
    return _suffix(file) in _SUFFIXES and not PurePosixPath(file).name.startswith((".", "_"))


def _listing(system: pafs.FileSystem, inner: str, path: str, *, recursive: bool) -> list[str]:
    try:
        infos = system.get_file_info(pafs.FileSelector(inner, allow_not_found=True, recursive=recursive))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be listed: {_reason(error)}") from None
    return sorted(info.path for info in infos if info.type == pafs.FileType.File)


def _hint(path: str) -> str:
    # Paths are resolved against the recipe; users often mean the directory they stand in.
    if "://" in path:
        return ""
    parts = Path(path).parts[1:] if os.path.isabs(path) else Path(path).parts
    for start in range(len(parts)):
        near = Path.cwd().joinpath(*parts[start:])
        if near.exists() and str(near) != path:
            return f"; {near} exists: give its absolute path if that is meant"
    return ""


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".")


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    system, inner = _locate(file)
    try:
        with system.open_input_file(inner) as raw:
            yield pq.ParquetFile(raw)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {_reason(error)}") from None


def _parquet_batches(file: str, columns: list[str], rows_per_batch: int) -> Iterator[Rows]:
    first_row = 0
    with _parquet(file) as opened:
        held = [name for name in columns if name in opened.schema_arrow.names]
        for batch in opened.iter_batches(batch_size=rows_per_batch, columns=held):
            values = {
                name: batch.column(name).to_pylist() if name in held else [None] * batch.num_rows
                for name in columns
            }
            yield Rows(file=file, first_row=first_row, columns=values)
            first_row += batch.num_rows


@contextmanager
def _json_lines(file: str) -> Iterator[io.BufferedReader]:
    system, inner = _locate(file)
    try:
        with system.open_input_stream(inner, compression=None) as raw:
            yield io.BufferedReader(raw, _BUFFER_BYTES)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read: {_reason(error)}") from None


def _json_rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with _json_lines(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield number, _json_row(file, number, line)


def _json_row(file: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start + 1}"
    except RecursionError:
        reason = "nested too deeply"
    else:
        if isinstance(value, dict):
            return value
        reason = "not an object"
    array = line.lstrip().startswith(b"[")
    advice = "; the file is read line by line, one JSON object on each, not as one array" if array else ""
    raise DataError(f"{file}, line {number}: not valid JSON: {reason}{advice}")


def _json_batches(file: str, columns: list[str], rows_per_batch: int) -> Iterator[Rows]:
    lines: list[int] = []
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for number, row in _json_rows(file):
        lines.append(number)
        for name in columns:
            values[name].append(row.get(name))
        if len(lines) == rows_per_batch:
            yield Rows(file=file, first_row=lines[0] - 1, columns=values, lines=lines)
            lines, values = [], {name: [] for name in columns}
    if lines:
        yield Rows(file=file, first_row=lines[0] - 1, columns=values, lines=lines)
