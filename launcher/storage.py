"""Where bytes live: list, read, write-then-commit, delete. One place, so that a run directory can move.

Paths are directories that the driver and all workers see under the same name.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends, and vanishes when it raises."""
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Return a name of its own beside `path`, to write to before the whole is moved there."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the whole of it or nothing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none, or where it is not whole.

    Raises:
        OSError: it is there, and cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends, and vanishes when it raises.

    Where `path` exists already at the end (another process was faster), that one stays.
    """
    aside = aside_of(path)
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            os.rename(aside, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file or a directory with all that is in it; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Make a directory that can be written.

    Raises:
        StorageError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = aside_of(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {os.strerror(error.errno or 0)}: give --run-root a directory that can"
        ) from None


def file_sizes(path: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a directory, by its relative name."""
    return {
        str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()
    }
