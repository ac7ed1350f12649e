"""Save, commit, find, restore, retain. A checkpoint exists when its commit record does, which is written last.

It does not know the number of workers or the ZeRO stage: each rank writes the fragments of parameters that it holds,
with their places, and each rank reads the fragments that it is to hold, out of whatever files have them.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher import storage
from launcher.errors import RunExists, StorageError
from launcher.train import shard_file
from launcher.train.writer import Writer, file_of, note_of, written_by_all

RECORD, DAMAGED = "commit.json", "damaged.json"
VERSION = 2
WAIT_S = 1800.0
SPARE = 1.05
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one engine in one directory that all ranks see."""

    def __init__(
        self,
        directory: Path,
        writer: Writer,
        *,
        keep: int,
        every_minutes: float | None,
        told: Told | None = None,
    ) -> None:
        """Remember the settings.

        Args:
            directory: of the checkpoints.
            writer: of the engine; shared where one engine is saved to several directories.
            keep: how many to keep; one is deleted when a newer one is committed.
            every_minutes: how often the clock wants one.
            told: is given a commit's step, bytes and seconds on rank 0, perhaps from another thread.
        """
        self.directory, self.writer, self.keep, self.told = directory, writer, keep, told
        self.every_s = every_minutes * 60 if every_minutes else None
        self.saved_at_s = time.monotonic()
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def clock_wants_save(self) -> bool:
        """Tell whether the time has come. Only rank 0's clock counts, so that ranks never split."""
        is_due = self.every_s is not None and time.monotonic() - self.saved_at_s >= self.every_s
        return is_due and self.rank == 0

    def latest(self) -> Found | None:
        """Return the newest checkpoint that is committed and has all its files in their sizes."""
        return next((found for found in reversed(self._committed()) if _has_files(found)), None)

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Save what continues a run after `step`; every rank must call it.

        Args:
            step: steps done.
            state: JSON values kept in the record: position, fingerprint, loss.

        Returns:
            Seconds until training could go on. The checkpoint may be committed later.

        Raises:
            StorageError: it cannot be written, or an earlier one could not.
        """
        started_s, path = time.monotonic(), self.directory / f"step-{step:08d}"
        engine_state = _engine_state(self.writer)

        def then(note: dict[str, Any]) -> None:
            storage.write_json(note_of(path, self.rank), note)
            if self.rank == 0:
                self._commit(path, step, engine_state | state, started_s, stalled_s)

        stalled_s = [0.0]
        with _storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            _check_space(path, self.writer)
            self.writer.write(file_of(path, self.rank), then)
        stalled_s[0] = time.monotonic() - started_s
        self.saved_at_s = time.monotonic()
        return stalled_s[0]

    def check(self) -> None:
        """Raise what has gone wrong in the background.

        Raises:
            StorageError: a checkpoint could not be written.
        """
        with _storage_errors(self.directory):
            self.writer.check()

    def wait(self) -> None:
        """Wait until what was saved is committed; every rank must call it.

        Raises:
            StorageError: it could not be written.
        """
        with _storage_errors(self.directory):
            self.writer.wait()
        dist.barrier()

    def restore(self, *, fingerprint: str, content: str = "") -> int:
        """Load the newest whole checkpoint into the engine; every rank must call it.

        Args:
            fingerprint: of the data and the way it is batched.
            content: a hash of all tokens, where it is known.

        Returns:
            The steps done; 0 without a checkpoint.

        Raises:
            RunExists: the checkpoint was made on other data, or by another version.
            StorageError: there are checkpoints, and all are damaged.
        """
        if self.rank == 0:
            self._delete_unfinished()
        damaged: Path | None = None
        while (found := self._agreed()) is not None:
            _check_origin(found, fingerprint, content)
            if self._is_whole(found):
                self._load(found)
                return found.step
            damaged = found.path
            if self.rank == 0:
                os.replace(found.path / RECORD, found.path / DAMAGED)
            dist.barrier()
        if damaged is not None:
            raise StorageError(
                f"{damaged}: its files are not those that were written, nor is there another whole"
                " checkpoint: look at the disk, then begin anew with --fresh"
            )
        return 0

    def _commit(
        self, path: Path, step: int, state: dict[str, Any], started_s: float, stalled_s: list[float]
    ) -> None:
        notes = written_by_all(path, self.num_ranks, WAIT_S)
        files = {file_of(path, rank).name: note for rank, note in enumerate(notes)}
        zero_stage = self.writer.shards.engine.zero_optimization_stage()
        record = {"version": VERSION, "step": step, "num_workers": self.num_ranks, "zero_stage": zero_stage}
        storage.write_json(path / RECORD, record | {"files": files} | state)
        for found in self._committed()[: -self.keep]:
            # The record goes first: half a deletion must not look like a checkpoint.
            storage.delete(found.path / RECORD)
            storage.delete(found.path)
        if self.told is not None:
            total = sum(note["bytes"] for note in notes)
            seconds = time.monotonic() - started_s
            stall_s = stalled_s[0] if self.writer.in_background else seconds
            self.told(
                {"step": step, "bytes": total, "stall_s": round(stall_s, 4), "save_s": round(seconds, 4)}
            )

    def _agreed(self) -> Found | None:
        """The newest checkpoint as rank 0 sees it."""
        found = self.latest() if self.rank == 0 else None
        told = torch.tensor([found.step if found else -1], device=self.writer.shards.engine.device)
        dist.broadcast(told, 0)
        step = int(told.item())
        if step < 0:
            return None
        path = self.directory / f"step-{step:08d}"
        return Found(path, step, storage.read_json(path / RECORD))

    def _is_whole(self, found: Found) -> bool:
        """Compare the digests of all files, each rank of its share."""
        mine = list(found.state["files"].items())[self.rank :: self.num_ranks]
        is_whole = all(_has_digest(found.path / name, note["digest"]) for name, note in mine)
        told = torch.tensor([int(is_whole)], device=self.writer.shards.engine.device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return bool(told.item())

    @torch.no_grad()
    def _load(self, found: Found) -> None:
        shards, files = self.writer.shards, [found.path / name for name in found.state["files"]]
        # What a rank wants is most likely in the file of the rank that had its place.
        first = self.rank * len(files) // self.num_ranks
        reader = shard_file.Reader(files[first:] + files[:first])
        shards.begin_restore()
        for flat in shards.flats:
            with shards.present(flat, written=True):
                keys = reader.keys(flat.held[0].name) if flat.held else []
                for key, tensor in shards.ensure(flat, keys).items():
                    for each in flat.held if key in keys else ():
                        reader.read(key, each.name, each.start, tensor[each.offset : each.offset + each.size])
        shards.end_restore()
        _set_engine_state(self.writer, found.state)

    def _committed(self) -> list[Found]:
        records = [(path, storage.read_json(path / RECORD)) for path in sorted(self.directory.glob("step-*"))]
        return [Found(path, state["step"], state) for path, state in records if state]

    def _delete_unfinished(self) -> None:
        for path in self.directory.glob("step-*"):
            if not (path / RECORD).exists() and not (path / DAMAGED).exists():
                storage.delete(path)


def _engine_state(writer: Writer) -> dict[str, Any]:
    """What an engine counts and what its optimizer counts, as JSON values."""
    engine = writer.shards.engine
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scales = {} if scaler is None else vars(scaler)
    return {
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "optimizer": writer.shards.scalars(),
        "loss_scaler": {k: v for k, v in scales.items() if type(v) in (int, float)},
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
    }


def _set_engine_state(writer: Writer, state: dict[str, Any]) -> None:
    engine = writer.shards.engine
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    writer.shards.set_scalars(state["optimizer"])
    # Another precision or stage may have no scale, or one of another kind.
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in state["loss_scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    if state["scheduler"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])


def _check_origin(found: Found, fingerprint: str, content: str) -> None:
    before = found.state.get("content", "")
    if found.state.get("version") != VERSION:
        raise RunExists(f"{found.path}: was made by another version of the launcher: begin anew with --fresh")
    if found.state["fingerprint"] != fingerprint or (before and content and before != content):
        raise RunExists(
            f"{found.path}: was made on other data than the recipe now names: restore the data,"
            " or begin anew with --fresh"
        )


def _check_space(path: Path, writer: Writer) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: it cannot.
    """
    needed = int(writer.shards.num_bytes() * SPARE)
    if (free := shutil.disk_usage(path).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free")


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Raise what goes wrong in writing as an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: the checkpoint could not be written: {error.strerror or error}: the checkpoints before it are"
            " kept; free space or mend the storage, and the same command continues"
        ) from error


def _has_files(found: Found) -> bool:
    files = found.state["files"].items()
    return all(
        (found.path / name).is_file() and (found.path / name).stat().st_size == note["bytes"]
        for name, note in files
    )


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return shard_file.digest_of(path) == digest
    except OSError:
        return False
