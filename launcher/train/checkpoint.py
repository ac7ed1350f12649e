"""Save, commit, find, restore, retain. A checkpoint exists when its commit record does, which is written last."""

import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher import storage
from launcher.errors import RunExists

RECORD = "commit.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, in a directory that all ranks see.

    Each rank writes its own shard through DeepSpeed; rank 0 writes the record when all have.
    """

    def __init__(self, directory: Path, *, keep: int, every_minutes: float | None) -> None:
        self.directory, self.keep = directory, keep
        self.every_s = every_minutes * 60 if every_minutes else None
        self.saved_at_s = time.monotonic()

    def clock_wants_save(self) -> bool:
        """Tell whether the time has come. Only rank 0's clock counts, so that ranks never split."""
        is_due = self.every_s is not None and time.monotonic() - self.saved_at_s >= self.every_s
        return is_due and dist.get_rank() == 0

    def latest(self) -> Found | None:
        """Return the newest checkpoint that is committed and whole."""
        for found in reversed(self._committed()):
            sizes = found.state["files"]
            if all(
                (found.path / f).is_file() and (found.path / f).stat().st_size == n for f, n in sizes.items()
            ):
                return found
        return None

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write what continues a run after `step`; every rank must call it.

        Args:
            engine: the DeepSpeed engine.
            step: steps done.
            state: JSON values kept in the record: position, fingerprint, loss.
        """
        tag = f"step-{step:08d}"
        path = self.directory / tag
        if dist.get_rank() == 0 and path.exists() and not (path / RECORD).exists():
            storage.delete(path)
        dist.barrier()
        # ds_to_universal refuses a checkpoint without this key, so it is there from the first day.
        client_state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        with contextlib.redirect_stdout(io.StringIO()):
            engine.save_checkpoint(str(self.directory), tag=tag, client_state=client_state, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            record = {
                "version": VERSION,
                "step": step,
                "num_workers": dist.get_world_size(),
                "zero_stage": engine.zero_optimization_stage(),
                "files": storage.file_sizes(path),
                **state,
            }
            storage.write_json(path / RECORD, record)
            self._retain()
        self.saved_at_s = time.monotonic()

    def restore(self, engine: Any, *, fingerprint: str, content: str = "") -> int:
        """Load the newest checkpoint into the engine; return the steps done, 0 without a checkpoint.

        Raises:
            RunExists: the checkpoint was made on other data, or by another number of workers, or its
                optimizer is on disks, which DeepSpeed 0.19.8 does not restore whole.
        """
        found = self.latest()
        if found is None:
            return 0
        if engine.zero_nvme_offload_optimizer():
            raise RunExists(
                f"{found.path}: a run whose optimizer is on NVMe cannot go on: DeepSpeed would restore a part"
                " of it only, without a word: begin anew with --fresh, or offload to the CPU"
            )
        before = found.state.get("content", "")
        is_other_content = before and content and before != content
        if (
            found.state.get("version") != VERSION
            or found.state["fingerprint"] != fingerprint
            or is_other_content
        ):
            raise RunExists(
                f"{found.path}: was made on other data than the recipe now names: restore the data,"
                " or begin anew with --fresh"
            )
        if found.state["num_workers"] != dist.get_world_size():
            raise RunExists(
                f"{found.path}: was made by {found.state['num_workers']} workers, there are"
                f" {dist.get_world_size()} now: continue with --workers {found.state['num_workers']}"
            )
        engine.load_checkpoint(str(self.directory), tag=found.path.name)
        return found.step

    def _committed(self) -> list[Found]:
        records = [(path, storage.read_json(path / RECORD)) for path in sorted(self.directory.glob("step-*"))]
        return [Found(path, state["step"], state) for path, state in records if state]

    def _retain(self) -> None:
        for found in self._committed()[: -self.keep]:
            # The record goes first: half a deletion must not look like a checkpoint.
            storage.delete(found.path / RECORD)
            storage.delete(found.path)
