"""The token store of one split: Arrow files that every rank maps into memory, and what is known of them.

A directory with part-00000.arrow, part-00001.arrow, ... (each one record batch) and meta.json, written
last. It appears under its name only when whole. The fingerprint is of the content: how rows were grouped
into parts, and where they lie, does not change it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.data.order import Integers
from launcher.errors import DataError
from launcher.plan.plan import SplitFacts
from launcher.storage import new_directory, read_json, write_json

# Feature name -> a list of sequences of integers (ragged), or a 1-D integer array (one for each sample).
Features: TypeAlias = dict[str, Any]
Int32s: TypeAlias = npt.NDArray[np.int32]

_FORMAT = 1
_META = "meta.json"


def write_split(
    directory: Path,
    parts: Iterable[Features],
    *,
    num_rows: Callable[[], int],
    num_skipped: Callable[[], int],
    labels: tuple[str, ...],
) -> SplitFacts:
    """Write a split as its parts come, and return what is known of it.

    Args:
        directory: appears when all is written; a whole one that another process made first stays.
        parts: all with the same features: ragged ones as lists of integer sequences, scalar ones as
            integer arrays of shape (samples,). "input_ids" (ragged) and "num_targets" (scalar) are
            among them. Everything is stored as int32.
        num_rows: rows read; called when the parts are exhausted.
        num_skipped: rows that made no sample; called when the parts are exhausted.
        labels: names of the classes, where the task has them.

    Returns:
        The exact facts of what lies in `directory`.
    """
    with new_directory(directory) as aside:
        tally = _Tally()
        for part in parts:
            columns = {name: _column(name, part[name]) for name in sorted(part)}
            if tally.add(columns):
                _write_part(_part_file(aside, tally.num_parts - 1), columns)
        facts = SplitFacts(
            num_rows=num_rows(),
            num_samples=tally.num_samples,
            exact=True,
            store=str(directory),
            fingerprint=tally.fingerprint(),
            num_skipped=num_skipped(),
            num_tokens=tally.num_tokens,
            num_targets=tally.num_targets,
            labels=labels,
        )
        meta = {"format": _FORMAT, "num_parts": tally.num_parts, "kinds": tally.kinds, "facts": asdict(facts)}
        write_json(aside / _META, meta)
    return read_facts(directory) or facts


def read_facts(directory: Path) -> SplitFacts | None:
    """Return the facts of a written split; None where there is none, or where it is not whole."""
    meta = _read_meta(directory)
    if meta is None:
        return None
    facts = SplitFacts(**meta["facts"] | {"labels": tuple(meta["facts"]["labels"])})
    return replace(facts, store=str(directory))


def open_split(directory: Path) -> "Split":
    """Map a written split into memory; no more is read than is asked for."""
    meta = _read_meta(directory)
    if meta is None:
        raise DataError(f"{directory}: not a prepared split, or not a whole one")
    batches = [_map_part(_part_file(directory, index)) for index in range(meta["num_parts"])]
    return Split(batches, kinds=meta["kinds"])


class Split:
    """A split in mapped memory.

    Attributes:
        num_samples: samples in all parts.
        lengths: int64 of shape (num_samples,): tokens of each.
        num_targets: int64 of shape (num_samples,): labels or tokens of each that bear loss.
        ragged: names of the features that are a sequence for each sample.
        scalars: names of the features that are one integer for each sample.
    """

    def __init__(self, batches: list[pa.RecordBatch], *, kinds: dict[str, str]) -> None:
        self.ragged = tuple(name for name, kind in kinds.items() if kind == "ragged")
        self.scalars = tuple(name for name, kind in kinds.items() if kind == "scalar")
        # Place 0 stands for "before the first part".
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int64)
        self._values = {name: [_numpy(b.column(name).values) for b in batches] for name in self.ragged}
        self._offsets = {name: [_numpy(b.column(name).offsets) for b in batches] for name in self.ragged}
        self._scalars = {name: _joined([_numpy(b.column(name)) for b in batches]) for name in self.scalars}
        self.num_samples = int(self._starts[-1])
        self.lengths = _joined([np.diff(offsets) for offsets in self._offsets.get("input_ids", [])])
        self.num_targets = self._scalars.get("num_targets", _joined([]))

    def take(self, samples: Integers) -> dict[str, list[Int32s] | Integers]:
        """Return the features of some samples, in the order asked.

        Args:
            samples: int64 of shape (n,), each below `num_samples`.

        Returns:
            By feature: ragged ones as n int32 arrays of shape (length,), read-only views of the mapped
            file; scalar ones as one int64 array of shape (n,).
        """
        parts = np.searchsorted(self._starts, samples, side="right") - 1
        places = list(zip(parts.tolist(), (samples - self._starts[parts]).tolist(), strict=True))
        taken: dict[str, list[Int32s] | Integers] = {
            name: self._scalars[name][samples] for name in self.scalars
        }
        for name in self.ragged:
            values, offsets = self._values[name], self._offsets[name]
            taken[name] = [values[p][offsets[p][row] : offsets[p][row + 1]] for p, row in places]
        return taken


class _Tally:
    """Counts and hashes of the columns as they are written."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.num_parts = self.num_samples = self.num_tokens = self.num_targets = 0
        self._hashes: dict[str, tuple[Any, Any]] = {}

    def add(self, columns: dict[str, pa.Array]) -> int:
        """Count one part; return its samples."""
        kinds = {name: "ragged" if pa.types.is_list(c.type) else "scalar" for name, c in columns.items()}
        if self.kinds and kinds != self.kinds:
            raise ValueError(f"parts of one split differ in their features: {self.kinds} and {kinds}")
        if kinds.get("input_ids") != "ragged" or kinds.get("num_targets") != "scalar":
            raise ValueError(f"a part needs ragged input_ids and scalar num_targets: {kinds}")
        self.kinds = kinds
        for name, column in columns.items():
            values, lengths = self._hashes.setdefault(name, (_hasher(), _hasher()))
            values.update(_numpy(column.values if kinds[name] == "ragged" else column))
            if kinds[name] == "ragged":
                lengths.update(np.diff(_numpy(column.offsets)))
        num_samples = len(columns["input_ids"])
        self.num_parts += num_samples > 0
        self.num_samples += num_samples
        self.num_tokens += len(columns["input_ids"].values)
        self.num_targets += int(_numpy(columns["num_targets"]).sum(dtype=np.int64))
        return num_samples

    def fingerprint(self) -> str:
        """Return a hash of the columns' names, kinds and content."""
        whole = _hasher()
        for name, (values, lengths) in sorted(self._hashes.items()):
            whole.update(f"{name}/{self.kinds[name]}/{values.hexdigest()}/{lengths.hexdigest()};".encode())
        return str(whole.hexdigest())


def _hasher() -> Any:
    return hashlib.blake2b(digest_size=16)


def _column(name: str, values: Any) -> pa.Array:
    if isinstance(values, np.ndarray):
        return pa.array(_int32(name, values), type=pa.int32())
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in values], out=offsets[1:])
    flat = np.concatenate([np.empty(0, np.int32), *(_int32(name, sequence) for sequence in values)])
    return pa.ListArray.from_arrays(pa.array(offsets).cast(pa.int32()), pa.array(flat, type=pa.int32()))


def _int32(name: str, values: Any) -> Int32s:
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise TypeError(f"{name}: integers in one dimension needed, not {array.dtype} of shape {array.shape}")
    narrow = array.astype(np.int32)
    if array.dtype.itemsize > 2 and not np.array_equal(narrow, array):
        raise OverflowError(f"{name}: a value does not fit 32 bits")
    return narrow


def _write_part(file: Path, columns: dict[str, pa.Array]) -> None:
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with open(file, "wb") as sink:
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        sink.flush()
        os.fsync(sink.fileno())


def _map_part(file: Path) -> pa.RecordBatch:
    try:
        # Closing gives the descriptor back; the mapping lives as long as the arrays that point into it.
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable, delete {file.parent} to prepare it anew: {error}") from None


def _part_file(directory: Path, index: int) -> Path:
    return directory / f"part-{index:05d}.arrow"


def _read_meta(directory: Path) -> Any:
    meta = read_json(directory / _META)
    return meta if isinstance(meta, dict) and meta.get("format") == _FORMAT else None


def _numpy(array: pa.Array) -> Int32s:
    view: Int32s = array.to_numpy(zero_copy_only=True)
    return view


def _joined(parts: list[Int32s]) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)
