"""Where files are: a disk, an object store, or whatever fsspec reaches. Opens, lists and stamps them."""

import functools
import hashlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from launcher.data import formats
from launcher.errors import DataError
from launcher.report import words

T = TypeVar("T")
R = TypeVar("R")

# A first answer comes within seconds or not at all; a store that is read for hours has bad minutes.
_ANSWER_LIMIT_S = 15
_TIMEOUT_S = 3
_ATTEMPTS_TO_FIND = 3
_ATTEMPTS_TO_READ = 8
_THREADS = 32
_OF_PYARROW = ("file", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf")
_STEP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """A path or URI as given, and the file system and path that it stands for."""

    given: str
    system: pafs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether the file can be opened by its path."""
        return isinstance(self.system, pafs.LocalFileSystem)

    def child(self, path: str) -> str:
        """Return the path or URI of `path`, a path of the file system at or below this one."""
        bare, query = split_query(self.given)
        below = path[len(self.path.rstrip("/")) :].strip("/")
        if "://" in bare and not isinstance(self.system, pafs.PyFileSystem):
            below = quote(below, safe="/=+,:@!$&'()*;~")
        return bare.rstrip("/") + f"/{below}" * bool(below) + query


def is_remote(file: str) -> bool:
    """Tell whether reading a file means asking another machine."""
    return "://" in file and not file.startswith("file:")


def split_query(given: str) -> tuple[str, str]:
    """Return a path or URI without its query, and the query with its `?`."""
    bare, mark, query = given.partition("?") if "://" in given else (given, "", "")
    return bare, mark + query


def shown(file: str) -> str:
    """Return a path or URI for a message: without what opens doors."""
    return words.redacted(file)


def reason(error: BaseException) -> str:
    """Return the first line of an error, for the end of a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".")


@contextmanager
def failures(file: str, what: str = "cannot be read") -> Iterator[None]:
    """Turn what goes wrong inside with `file` into a DataError that names it."""
    # Each library behind fsspec has errors of its own, without a common base.
    kinds = (Exception,) if "://" in file else (pa.ArrowException, OSError, UnicodeDecodeError, EOFError)
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{shown(file)}: no such file") from None
    except kinds as error:
        raise DataError(f"{shown(file)}: {what}: {reason(error)}") from None


def find(given: str) -> tuple[Place, pafs.FileInfo]:
    """Return a place and what is there; for a remote one, wait no longer than some seconds.

    Raises:
        DataError: it cannot be reached.
    """

    def ask() -> tuple[Place, pafs.FileInfo]:
        place = locate(given, _ATTEMPTS_TO_FIND)
        with failures(given):
            return place, place.system.get_file_info(place.path)

    return _within_limit(given, ask) if "://" in given else ask()


def locate(given: str, attempts: int = _ATTEMPTS_TO_READ) -> Place:
    """Return the place of a path or URI.

    Raises:
        DataError: it is not a URI that can be read.
    """
    if "://" not in given:
        return Place(given, pafs.LocalFileSystem(), given)
    bare, query = split_query(given)
    scheme, _, rest = bare.partition("://")
    with failures(given, "not a place that can be read"):
        if scheme in ("s3", "s3a"):
            user, _, path = rest.rpartition("@") if "@" in rest.split("/")[0] else ("", "", rest)
            bucket = path.split("/")[0]
            return Place(given, _s3(given, bucket, user, query[1:], _environment(), attempts), unquote(path))
        if scheme not in _OF_PYARROW:
            return Place(given, *_fsspec(given))
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
            query = f"{query or '?'}&retry_limit_seconds={attempts * _TIMEOUT_S}".replace("?&", "?")
        # A percent sign stands for itself where it is not the code of another sign.
        coded = re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(bare, safe="/:?[]@!$&'()*+,;=%~"))
        system, path = pafs.FileSystem.from_uri(coded + query)
        return Place(given, system, bare.partition("://")[2] if scheme == "hf" else path)


def list_below(place: Place, *, recursive: bool) -> list[str]:
    """Return the files below a directory, as paths of its file system, sorted."""
    with failures(place.given, "cannot be listed"):
        infos = place.system.get_file_info(
            pafs.FileSelector(place.path, allow_not_found=True, recursive=recursive)
        )
        return sorted(info.path for info in infos if info.type == pafs.FileType.File)


def stamp(file: str) -> tuple[int, int]:
    """Return a file's size in bytes and its time of change in ns, to tell whether it is still the same.

    Raises:
        DataError: there is no such file.
    """
    place = locate(file)
    with failures(file):
        info = place.system.get_file_info(place.path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(file)
        changed_ns = info.mtime_ns
        if changed_ns is None and isinstance(place.system, pafs.PyFileSystem):
            # What has no time has another mark of its content (an etag, a commit).
            mark = str(place.system.handler.fs.ukey(place.path)).encode()
            changed_ns = int.from_bytes(hashlib.blake2b(mark, digest_size=7).digest(), "big")
    return int(info.size or 0), int(changed_ns or 0)


def size(file: str) -> int:
    """Return a file's size in bytes."""
    return stamp(file)[0]


def for_each(files: Sequence[T], ask: Callable[[T], R]) -> list[R]:
    """Return `ask` of every file, in order, many at a time: what is asked mostly waits."""
    if len(files) < 3:
        return [ask(file) for file in files]
    with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        return list(pool.map(ask, files))


@contextmanager
def open_stream(file: str) -> Iterator[pa.NativeFile]:
    """Open a file to be read from its beginning, uncompressed."""
    place = locate(file)
    with (
        failures(file),
        place.system.open_input_stream(place.path, compression=formats.compression(file)) as opened,
    ):
        yield opened


@contextmanager
def open_file(file: str) -> Iterator[pa.NativeFile]:
    """Open a file to be read anywhere; a local one is mapped into memory."""
    place = locate(file)
    with failures(file):
        if place.is_local and os.path.getsize(place.path):
            opened = pa.memory_map(place.path)
        else:
            opened = place.system.open_input_file(place.path)
        with opened:
            yield opened


@dataclass(frozen=True, slots=True)
class Start:
    """The first bytes of a file, unpacked.

    Attributes:
        content: the bytes.
        is_whole: whether the file ends there.
        share: of the file's own bytes, about how many they are.
    """

    content: bytes
    is_whole: bool
    share: int


def read_start(file: str, num_bytes: int) -> Start:
    """Return the first `num_bytes` of a file."""
    packing = formats.compression(file)
    with failures(file), open_file(file) as raw:
        if packing is not None and raw.size() == 0:
            return Start(b"", True, 0)
        opened = raw if packing is None else pa.CompressedInputStream(raw, packing)
        content = bytearray()
        packed_per_byte = 1.0 if packing is None else 0.0
        while len(content) <= num_bytes or not packed_per_byte and len(content) < 32 * num_bytes:
            num_packed = raw.tell()
            block = opened.read(_STEP_BYTES)
            if not block:
                is_whole = len(content) <= num_bytes
                share = raw.size() * min(len(content), num_bytes) // max(1, len(content))
                return Start(bytes(content[:num_bytes]), is_whole, share)
            # When more is fetched, what came before it has been used up.
            if packing is not None and content and raw.tell() > num_packed:
                packed_per_byte = num_packed / len(content)
            content += block
        packed_per_byte = packed_per_byte or raw.tell() / len(content)
        return Start(bytes(content[:num_bytes]), False, round(num_bytes * packed_per_byte))


def _within_limit(given: str, ask: Callable[[], T]) -> T:
    # Not every client has a timeout, and those that have one repeat it: this one holds for all.
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=_ANSWER_LIMIT_S)
    except queue.Empty:
        raise DataError(
            f"{shown(given)}: no answer within {_ANSWER_LIMIT_S} s: check the address, the network and the"
            " credentials"
        ) from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # an answer and an error exclude each other


def _fsspec(given: str) -> tuple[pafs.FileSystem, str]:
    import fsspec  # comes with `datasets`; needed for the rarer places only

    try:
        system, path = fsspec.core.url_to_fs(given)
    except (ImportError, ValueError) as error:
        raise DataError(f"{shown(given)}: not a place that can be read: {reason(error)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


def _environment() -> tuple[str, bool]:
    # The endpoint, which pyarrow does not read by itself, and whether a region is set, which it does.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return endpoint, bool(os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))


def _s3(
    given: str, bucket: str, user: str, query: str, environment: tuple[str, bool], attempts: int
) -> pafs.FileSystem:
    options = dict(parse_qsl(query))
    known = ("region", "scheme", "endpoint_override")
    if unknown := sorted(set(options) - set(known)):
        raise DataError(f'{shown(given)}: "{unknown[0]}" is not known there; known are: {", ".join(known)}')
    endpoint, has_region = environment
    if endpoint and "endpoint_override" not in options:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options = {"scheme": parts.scheme, "endpoint_override": parts.netloc} | options
    if not has_region and "endpoint_override" not in options and "region" not in options:
        options["region"] = _region_of(bucket)
    key, _, secret = user.partition(":")
    return _s3_client(unquote(key) or None, unquote(secret) or None, tuple(sorted(options.items())), attempts)


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str:
    return str(pafs.resolve_s3_region(bucket))


@functools.lru_cache(maxsize=64)
def _s3_client(
    key: str | None, secret: str | None, options: tuple[tuple[str, str], ...], attempts: int
) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        access_key=key,
        secret_key=secret,
        connect_timeout=_TIMEOUT_S,
        request_timeout=_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        **dict(options),
    )
