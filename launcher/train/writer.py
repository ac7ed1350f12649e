"""Saving beside training: the state is copied, and a thread writes the copy while steps go on."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from launcher import storage
from launcher.train import shard_file
from launcher.train.shard_file import Entry
from launcher.train.shards import Flat, Shards

SEEN_EVERY_S = 0.05


class Writer:
    """Writes this rank's part of one engine's checkpoints, one at a time."""

    def __init__(self, engine: Any, *, in_background: bool) -> None:
        """Find out what there is to write.

        Args:
            engine: the DeepSpeed engine.
            in_background: copy the state and write the copy beside training; else write at once what is there,
                which takes no memory.
        """
        self.shards, self.in_background = Shards(engine), in_background
        self.on_gpu = next(engine.module.parameters()).device.type == "cuda"
        self.copies: dict[tuple[int, str], torch.Tensor] = {}
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def write(self, path: Path, then: Callable[[dict[str, Any]], None]) -> None:
        """Write the state as it is now; return when it may change again.

        Args:
            path: of this rank's file.
            then: is given the file's bytes and digest when it is written.

        Raises:
            OSError: an earlier write has failed, or this one did.
        """
        self.wait()
        if not self.in_background:
            entries = [entry for flat in self.shards.flats for entry, _ in self._of(flat)]
            then(shard_file.write(path, entries, self._streamed()))
            return
        pieces = self._copied()

        def run() -> None:
            try:
                then(shard_file.write(path, [e for e, _ in pieces], (piece for _, piece in pieces)))
            except BaseException as failure:
                self.failure = failure

        self.thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            OSError: it could not be.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong in the background."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _copied(self) -> list[tuple[Entry, torch.Tensor]]:
        """Copy the state into memory that is kept for this; return its pieces."""
        pieces = []
        for flat in self.shards.flats:
            begin, end = flat.window
            with self.shards.present(flat):
                for key, tensor in self.shards.tensors(flat).items():
                    copy = self._room(flat, key, tensor[begin:end])
                    copy.copy_(tensor[begin:end], non_blocking=True)
                    pieces += [
                        (_entry(key, each, copy), copy[each.offset - begin : each.offset - begin + each.size])
                        for each in flat.written()
                    ]
        if self.on_gpu:
            torch.cuda.synchronize()
        return pieces

    def _room(self, flat: Flat, key: str, like: torch.Tensor) -> torch.Tensor:
        known = self.copies.get((flat.number, key))
        if known is None:
            known = torch.empty(like.shape, dtype=like.dtype, pin_memory=self.on_gpu)
            self.copies[flat.number, key] = known
        return known

    def _of(self, flat: Flat) -> Iterator[tuple[Entry, torch.Tensor]]:
        with self.shards.present(flat):
            for key, tensor in self.shards.tensors(flat).items():
                for each in flat.written():
                    yield _entry(key, each, tensor), tensor[each.offset : each.offset + each.size]

    def _streamed(self) -> Iterator[torch.Tensor]:
        for flat in self.shards.flats:
            for _, piece in self._of(flat):
                yield piece.cpu()


def _entry(key: str, fragment: Any, tensor: torch.Tensor) -> Entry:
    return Entry(key, fragment.name, fragment.start, fragment.size, tensor.dtype)


def written_by_all(folder: Path, num_ranks: int, limit_s: float) -> list[dict[str, Any]]:
    """Wait until every rank has noted its file; return the notes.

    Raises:
        TimeoutError: one has not.
    """
    until_s = time.monotonic() + limit_s
    while True:
        notes = [storage.read_json(note_of(folder, rank)) for rank in range(num_ranks)]
        if all(note is not None for note in notes):
            return notes
        if time.monotonic() > until_s:
            late = [rank for rank, note in enumerate(notes) if note is None]
            raise TimeoutError(f"{folder}: rank {late[0]} has not written its part within {limit_s:g} s")
        time.sleep(SEEN_EVERY_S)


def file_of(folder: Path, rank: int) -> Path:
    """A rank's file."""
    return folder / f"rank-{rank:05d}.safetensors"


def note_of(folder: Path, rank: int) -> Path:
    """Where a rank notes that its file is written, with its size and digest."""
    return folder / f"rank-{rank:05d}.json"
