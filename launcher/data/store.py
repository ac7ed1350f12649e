"""The token store: prepared samples as Arrow files, read back as zero-copy views.

A split is a directory: part-00000.arrow, … (one record batch each), and meta.json, written last.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from launcher import storage
from launcher.data.order import Integers
from launcher.plan.plan import SplitFacts

META = "meta.json"
Features = dict[str, Any]


def write_split(
    directory: Path,
    parts: Iterable[Features],
    *,
    num_rows: Callable[[], int],
    num_skipped: Callable[[], int],
    labels: tuple[str, ...],
) -> SplitFacts:
    """Write a split; it appears when it is whole.

    Args:
        directory: the place of the split.
        parts: pieces of features. Lists of integer sequences become ragged columns, integers plain
            ones; `input_ids` and `num_targets` must be among them.
        num_rows: asked at the end: how many rows the samples were made of.
        num_skipped: asked at the end: how many of them gave no sample.
        labels: the label words in order.

    Returns:
        The facts of the split. The fingerprint depends on the content alone, not on file names, times
        or how the rows were grouped.
    """
    hashers: dict[str, list[Any]] = {}
    totals = {"samples": 0, "tokens": 0, "targets": 0}
    with storage.new_directory(directory) as aside:
        for features in parts:
            batch = pa.record_batch({name: _array(values) for name, values in sorted(features.items())})
            if batch.num_rows == 0:
                continue
            number = len(list(aside.glob("part-*")))
            with pa.OSFile(str(aside / f"part-{number:05d}.arrow"), "wb") as file, pa.ipc.new_file(
                file, batch.schema
            ) as writer:
                writer.write_batch(batch)
            _hash(batch, hashers)
            totals["samples"] += batch.num_rows
            totals["tokens"] += len(batch.column("input_ids").flatten())
            totals["targets"] += int(np.sum(batch.column("num_targets").to_numpy()))
        digests = [f"{name}:{h.hexdigest()}" for name in sorted(hashers) for h in hashers[name]]
        facts = SplitFacts(
            num_rows=num_rows(),
            num_samples=totals["samples"],
            exact=True,
            store=str(directory),
            fingerprint=hashlib.blake2b("/".join(digests).encode(), digest_size=16).hexdigest(),
            num_skipped=num_skipped(),
            num_tokens=totals["tokens"],
            num_targets=totals["targets"],
            labels=labels,
        )
        storage.write_json(aside / META, dataclasses.asdict(facts))
    return facts


def read_facts(directory: Path) -> SplitFacts | None:
    """Return the facts of a split that is whole, else None."""
    meta = storage.read_json(directory / META)
    if meta is None:
        return None
    return SplitFacts(**{**meta, "labels": tuple(meta["labels"]), "store": str(directory)})


class Split:
    """A split, memory-mapped: nothing is copied until samples are taken.

    Attributes:
        num_samples: samples in the split.
        lengths: int64 of shape (num_samples,): tokens of each.
        num_targets: int64 of shape (num_samples,): loss-bearing labels of each.
    """

    def __init__(self, directory: Path) -> None:
        self._parts = [_Part(path) for path in sorted(directory.glob("part-*.arrow"))]
        counts = [part.num_samples for part in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self.ragged = tuple(self._parts[0].ragged)
        self.scalars = tuple(self._parts[0].scalars)
        self.lengths = np.concatenate([part.lengths for part in self._parts])
        self.num_targets = np.concatenate([part.scalars["num_targets"] for part in self._parts]).astype(np.int64)

    def take(self, samples: Integers) -> dict[str, Any]:
        """Return samples by index, in the order asked.

        Returns:
            For a ragged feature a list of int32 views of shape (tokens,); for a scalar one an int32
            array of shape (len(samples),).
        """
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        places = [(self._parts[n], int(i)) for n, i in zip(numbers, samples - self._starts[numbers], strict=True)]
        taken: dict[str, Any] = {name: [part.view(name, i) for part, i in places] for name in self.ragged}
        for name in self.scalars:
            taken[name] = np.array([part.scalars[name][i] for part, i in places], dtype=np.int32)
        return taken


class _Part:
    """One file of a split."""

    def __init__(self, path: Path) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.num_samples = batch.num_rows
        self.ragged: dict[str, tuple[Any, Any]] = {}
        self.scalars: dict[str, Any] = {}
        for name in batch.schema.names:
            column = batch.column(name)
            if pa.types.is_list(column.type):
                self.ragged[name] = (column.offsets.to_numpy(), column.values.to_numpy())
            else:
                self.scalars[name] = column.to_numpy()
        self.lengths = np.diff(self.ragged["input_ids"][0]).astype(np.int64)

    def view(self, name: str, i: int) -> Any:
        offsets, values = self.ragged[name]
        return values[offsets[i] : offsets[i + 1]]


def open_split(directory: Path) -> Split:
    """Open a split that `write_split` made."""
    return Split(directory)


def _array(values: Any) -> pa.Array:
    is_ragged = len(values) > 0 and np.ndim(values[0]) == 1
    return pa.array(values, type=pa.list_(pa.int32()) if is_ragged else pa.int32())


def _hash(batch: pa.RecordBatch, hashers: dict[str, list[Any]]) -> None:
    for name in batch.schema.names:
        column = batch.column(name)
        if pa.types.is_list(column.type):
            pieces = [column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())]
        else:
            pieces = [column.to_numpy()]
        known = hashers.setdefault(name, [hashlib.blake2b(digest_size=16) for _ in pieces])
        for hasher, piece in zip(known, pieces, strict=True):
            hasher.update(np.ascontiguousarray(piece, dtype="<i4").tobytes())
