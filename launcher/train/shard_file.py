"""A rank's file of a checkpoint: safetensors, written tensor by tensor, with a digest; read in parts, never unpickled."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from launcher import storage
from launcher.errors import StorageError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_CHUNK = 1 << 24
_ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `size` elements from `start` of what `key` keeps of the parameter `name`."""

    key: str
    name: str
    start: int
    size: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.key}/{self.name}"


def write(path: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor]) -> dict[str, int | str]:
    """Write a file, so that it is there whole or not at all.

    Args:
        path: of the file.
        entries: what it holds.
        tensors: their values in that order: one-dimensional, on the host.

    Returns:
        Its `bytes` and its `digest`.
    """
    header, begin = {}, 0
    for each in entries:
        end = begin + each.size * each.dtype.itemsize
        header[each.label] = {"dtype": _NAMES[each.dtype], "shape": [each.size], "data_offsets": [begin, end]}
        begin = end
    starts = json.dumps({each.label: each.start for each in entries})
    text = json.dumps({"__metadata__": {"starts": starts}, **header}).encode()
    text += b" " * (-len(text) % _ALIGNED)
    digest, written = hashlib.blake2b(digest_size=16), 0
    with storage.new_file(path) as file:
        for chunk in _chunks(struct.pack("<Q", len(text)) + text, tensors):
            file.write(chunk)
            digest.update(chunk)
            written += len(chunk)
    return {"bytes": written, "digest": digest.hexdigest()}


def digest_of(path: Path) -> str:
    """Return the digest of a file as it is on storage now."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Reader:
    """Reads parts of parameters out of a checkpoint's files, whoever wrote which."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Remember the files.

        Args:
            files: in the order in which it is best to look.
        """
        self.files = list(files)
        self.opened: list[tuple[object, dict[str, int]]] = []

    def keys(self, name: str) -> list[str]:
        """Return what is kept of a parameter: the weights, and the optimizer's keys."""
        found: dict[str, None] = {}
        for _, starts in self._all():
            found |= {label.partition("/")[0]: None for label in starts if label.partition("/")[2] == name}
            if found:
                break
        return list(found)

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill a tensor with elements of what `key` keeps of a parameter.

        Args:
            key: the weights, or one of the optimizer's.
            name: of the parameter.
            start: of the first element in the flattened parameter.
            out: one-dimensional, on any device.

        Raises:
            StorageError: no file has them.
        """
        label, missing = f"{key}/{name}", [(start, start + out.numel())]
        for file, starts in self._all():
            if not missing:
                return
            if label in starts:
                missing = _filled(file, label, starts[label], missing, out, start)
        if missing:
            raise StorageError(f"{self.files[0].parent}: holds no elements {missing[0]} of {label}")

    def _all(self) -> Iterable[tuple[object, dict[str, int]]]:
        yield from self.opened
        while len(self.opened) < len(self.files):
            path = self.files[len(self.opened)]
            try:
                file = safe_open(path, framework="pt")
                starts = json.loads((file.metadata() or {})["starts"])
            except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
                raise StorageError(f"{path}: is no file of a checkpoint: {error}") from None
            self.opened.append((file, starts))
            yield self.opened[-1]


def _filled(
    file: object,
    label: str,
    first: int,
    missing: list[tuple[int, int]],
    out: torch.Tensor,
    start: int,
) -> list[tuple[int, int]]:
    """Copy what a file has of the missing ranges; return what is still missing."""
    piece = file.get_slice(label)  # type: ignore[attr-defined]
    last, left = first + piece.get_shape()[0], []
    for begin, end in missing:
        low, high = max(begin, first), min(end, last)
        if low >= high:
            left.append((begin, end))
            continue
        out[low - start : high - start].copy_(piece[low - first : high - first])
        left += [(a, b) for a, b in ((begin, low), (high, end)) if a < b]
    return left


def _chunks(head: bytes, tensors: Iterable[torch.Tensor]) -> Iterable[bytes | memoryview]:
    yield head
    for tensor in tensors:
        view = memoryview(tensor.contiguous().view(torch.uint8).numpy())
        for begin in range(0, len(view), _CHUNK):
            yield view[begin : begin + _CHUNK]
