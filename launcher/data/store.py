"""The token store of one data set: Arrow files that every rank maps into memory, made block by block.

A directory with manifest.json (what it is made of; written first), block-00000.arrow, … (one record batch
each; every file appears whole or not at all) and meta.json (written last, when all blocks are there). So
an interrupted preparation goes on where it was, and a run can train on the first blocks while the rest is
being made.
"""

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from launcher.data.order import BLOCKS_PER_WINDOW, Integers
from launcher.errors import DataError, StorageError
from launcher.storage import new_file, read_json, write_json

FORMAT = 2
MANIFEST, META, ERROR = "manifest.json", "meta.json", "error.json"
LOCK, BEAT, USED = ".lock", ".beat", ".used"
NUM_TARGETS, PACK = "num_targets", "pack"
INPUT_IDS = "input_ids"

Array: TypeAlias = npt.NDArray[Any]
Ragged: TypeAlias = tuple[Array, Array]
"""The values of all samples one after another, and each sample's length."""

# Two windows: where a step goes from one to the next, it has both.
_MOST_OPEN = 2 * BLOCKS_PER_WINDOW
_POLL_S, _SILENT_S = 0.05, 60.0
_FACTS = b"launcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What is known of one block, or of all blocks of a store together."""

    num_rows: int = 0
    num_samples: int = 0
    num_packs: int = 0
    num_skipped: int = 0
    num_bad: int = 0
    num_cut: int = 0
    num_cut_tokens: int = 0
    num_tokens: int = 0
    num_targets: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a store is made of; decided before the first block is made.

    Attributes:
        fingerprint: of the files' names and sizes and of all settings: what the order is keyed by. It
            does not change when files move or are copied.
        files: path, bytes and time of change (ns) of each file.
        columns: the files' columns.
        chunk_bytes: the size of a chunk of input, about; one task makes one.
        num_chunks: how many there are.
        nominal: rows of each chunk, where a row has just one place in the order; else None.
        is_bounded: whether each chunk makes just one block, so that blocks can be named beforehand.
    """

    fingerprint: str
    files: tuple[tuple[str, int, int], ...]
    columns: tuple[str, ...]
    chunk_bytes: int
    num_chunks: int
    nominal: tuple[int, ...] | None
    is_bounded: bool


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Begin a store; whoever comes second finds the same manifest."""
    write_json(directory / MANIFEST, {"format": FORMAT, **asdict(manifest)})


def read_manifest(directory: Path) -> Manifest | None:
    """Return a store's manifest; None where there is none, or one of another format."""
    tree = read_json(directory / MANIFEST)
    if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
        return None
    files = tuple((str(file), int(size), int(mtime)) for file, size, mtime in tree["files"])
    nominal = None if tree["nominal"] is None else tuple(tree["nominal"])
    return Manifest(**tree | {"files": files, "nominal": nominal, "columns": tuple(tree["columns"])})


def block_name(chunk: int, part: int | None = None) -> str:
    """Return the file of a chunk's block; chunks that are not bounded make several parts."""
    return f"block-{chunk:06d}.arrow" if part is None else f"block-{chunk:06d}.{part:05d}.arrow"


def write_block(
    file: Path,
    ragged: dict[str, Ragged],
    scalars: dict[str, Array],
    counts: Counts,
    *,
    pack: Array | None = None,
) -> None:
    """Write one block so that it appears whole or not at all.

    Args:
        file: the block's path.
        ragged: by feature, "input_ids" among them; any integers.
        scalars: by feature one integer a sample, "num_targets" among them.
        counts: kept in the file's header.
        pack: the pack of each sample, if samples are packed.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    columns = {name: _list_array(*ragged[name]) for name in sorted(ragged)}
    columns |= {name: pa.array(scalars[name]) for name in sorted(scalars)}
    if pack is not None:
        columns[PACK] = pa.array(pack.astype(np.int32))
    batch = pa.record_batch(columns)
    digest = hashlib.blake2b(digest_size=16)
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer is not None:
                digest.update(buffer)
    facts = json.dumps({**asdict(counts), "digest": digest.hexdigest()})
    batch = batch.replace_schema_metadata({_FACTS: facts.encode()})
    with writing(file.parent), new_file(file) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


@contextmanager
def writing(directory: Path) -> Any:
    """Turn what a disk says into an error that tells what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"{directory}: cannot be written: {reason}; what was prepared so far is kept: make room, or"
            " give --run-root another disk, and start the same command again"
        ) from None


def block_counts(file: Path) -> tuple[Counts, str] | None:
    """Return (counts, content digest) from a block's header; None where it is missing or not whole."""
    try:
        with pa.memory_map(str(file)) as source:
            facts = json.loads(pa.ipc.open_file(source).schema.metadata[_FACTS])
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
    digest = str(facts.pop("digest"))
    return Counts(**facts), digest


def commit(directory: Path, blocks: Iterable[str]) -> Counts:
    """Write the record that makes a store whole; every block must be there.

    Returns:
        The counts of all blocks together.
    """
    names = list(blocks)
    total, digest, each = Counts(), hashlib.blake2b(digest_size=16), []
    for name in names:
        found = block_counts(directory / name)
        if found is None:
            raise DataError(
                f"{directory / name}: is damaged: start the same command again to prepare it anew"
            )
        total += found[0]
        digest.update(found[1].encode())
        each.append([name, (directory / name).stat().st_size, found[0].num_samples, found[0].num_packs])
    with writing(directory):
        meta = {"format": FORMAT, "content": digest.hexdigest(), "counts": asdict(total), "blocks": each}
        write_json(directory / META, meta)
    return total


def read_meta(directory: Path) -> dict[str, Any] | None:
    """Return the record of a whole store; None while it is being made, or where it is damaged."""
    meta = read_json(directory / META)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return None
    for name, size, *_ in meta["blocks"]:
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return meta


class Block:
    """One block in mapped memory.

    Attributes:
        lengths: int64 of shape (samples,): tokens of each.
        widths: int64 of shape (samples,): the longest sequence of each that a model is given, its answer among them:
            what it is padded by.
        targets: int64 of shape (samples,): labels or tokens of each that bear loss.
        ragged: by feature (values, offsets), views of the mapped file.
        features: by feature one integer a sample, views of the mapped file.
    """

    def __init__(self, file: Path) -> None:
        try:
            # Closing gives the descriptor back; the mapping lives as long as the arrays that point into it.
            with pa.memory_map(str(file)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file}: not readable, delete {file.parent} to prepare it anew: {error}"
            ) from None
        self.ragged: dict[str, tuple[Array, Array]] = {}
        self.features: dict[str, Array] = {}
        for name in batch.schema.names:
            column = batch.column(name)
            if pa.types.is_large_list(column.type):
                self.ragged[name] = (_numpy(column.values), _numpy(column.offsets))
            else:
                self.features[name] = _numpy(column)
        self.lengths: Integers = np.diff(self.ragged[INPUT_IDS][1])
        given = [offsets for name, (_, offsets) in self.ragged.items() if not name.startswith("_")]
        self.widths: Integers = np.maximum.reduce([np.diff(offsets) for offsets in given])
        self.targets: Integers = self.features.pop(NUM_TARGETS).astype(np.int64)
        self._pack = self.features.pop(PACK, None)
        self._packs: tuple[Integers, Integers] | None = None

    def packs(self) -> tuple[Integers, Integers]:
        """Return (samples by pack, where each pack begins among them and one past the last)."""
        if self._packs is None:
            pack = self._pack
            assert pack is not None, "a store of a task whose samples are packed"
            starts = np.concatenate([[0], np.cumsum(np.bincount(pack))]).astype(np.int64)
            self._packs = np.argsort(pack, kind="stable"), starts
        return self._packs


class Store:
    """A store, whole or still being made: then it waits for the block that is asked for."""

    def __init__(self, directory: Path, *, most_open: int = _MOST_OPEN) -> None:
        manifest = read_manifest(directory)
        if manifest is None:
            raise DataError(f"{directory}: not a token store, or one of another version")
        self.directory, self.manifest = directory, manifest
        self.meta = read_meta(directory)
        self._most_open = most_open
        self._open: OrderedDict[int, Block] = OrderedDict()
        if self.meta is None and not manifest.is_bounded:
            self._wait_for(META)
            self.meta = read_meta(directory)
        self._names: list[str] = (
            [name for name, *_ in self.meta["blocks"]]
            if self.meta is not None
            else [block_name(chunk) for chunk in range(manifest.num_chunks)]
        )
        self._counts: dict[bool, Integers] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._names)

    @property
    def is_settled(self) -> bool:
        """Whether the number of units of every block is known, by the manifest or since all is made."""
        return self.meta is not None or self.manifest.nominal is not None

    def block(self, index: int) -> Block:
        """Map a block; the ones used longest ago are closed."""
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        self._wait_for(self._names[index])
        block = self._open[index] = Block(self.directory / self._names[index])
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return block

    def num_units(self, blocks: Integers, *, packed: bool) -> Integers:
        """Return the units of some blocks: packs, or places of samples.

        Where the manifest gives a block's rows, they are its places, whatever became of them: so the
        order does not depend on how far the preparation is. A row without a sample leaves a hole.
        """
        if not packed and self.manifest.nominal is not None:
            return np.array(self.manifest.nominal, dtype=np.int64)[blocks]
        if self.meta is not None:
            if packed not in self._counts:
                column = [entry[3 if packed else 2] for entry in self.meta["blocks"]]
                self._counts[packed] = np.array(column, dtype=np.int64)
            return self._counts[packed][blocks]
        return np.array([self._count(int(block), packed) for block in blocks], dtype=np.int64)

    def _count(self, index: int, packed: bool) -> int:
        self._wait_for(self._names[index])
        found = block_counts(self.directory / self._names[index])
        if found is None:
            raise DataError(f"{self.directory / self._names[index]}: is damaged: delete {self.directory}")
        return found[0].num_packs if packed else found[0].num_samples

    def _wait_for(self, name: str) -> None:
        pause_s, beat, beaten_s = _POLL_S, self._beat(), time.monotonic()
        while not (self.directory / name).exists():
            told = read_json(self.directory / ERROR)
            if told is not None:
                raise DataError(told["message"])
            time.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)
            if (now := self._beat()) != beat:
                beat, beaten_s = now, time.monotonic()
            elif time.monotonic() - beaten_s > _SILENT_S:
                raise DataError(
                    f"{self.directory}: nobody makes {name} any more: the preparation has ended; the same"
                    " command goes on from there"
                )

    def _beat(self) -> int:
        """When its maker last showed itself, by the clock of the disk: only changes mean something."""
        try:
            return (self.directory / BEAT).stat().st_mtime_ns
        except OSError:
            return 0


def _list_array(values: Array, lengths: Array) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _numpy(array: pa.Array) -> Array:
    view: Array = array.to_numpy(zero_copy_only=True)
    return view
