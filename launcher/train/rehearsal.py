"""A dry save and load: step 0 of a small model, by the run's own ranks, under its ds config, in its run root."""

import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from launcher.errors import StorageError
from launcher.train import light as _light  # noqa: F401  before DeepSpeed does what it leaves out
from launcher.train.checkpoint import Checkpoints
from launcher.train.model import gathered
from launcher.train.writer import Writer

_WIDTH = 64
_NAME = "rehearsal"


def save_and_load(ds: dict[str, Any], folder: Path) -> float:
    """Save a checkpoint and restore it into an engine with other weights; every rank calls it.

    Args:
        ds: the completed ds config.
        folder: below the run root, seen by all ranks.

    Returns:
        Seconds that saving and loading took.

    Raises:
        StorageError: a rank does not find what was saved, or finds something else.
    """
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    saved, restored = _engine(ds, seed=0), _engine(ds, seed=1)
    started_s = time.monotonic()
    checkpoints = _checkpoints(folder, saved)
    checkpoints.save(0, {"fingerprint": _NAME, "position": 0})
    checkpoints.wait()
    if (found := checkpoints.latest()) is None:
        raise StorageError(
            f"{folder}: rank {dist.get_rank()} does not see the checkpoint that all have saved"
        )
    _checkpoints(folder, restored).restore(fingerprint=_NAME)
    for one, other in zip(saved.module.parameters(), restored.module.parameters(), strict=True):
        with gathered([one, other]):
            if not torch.equal(one, other):
                raise StorageError(
                    f"{found.path}: rank {dist.get_rank()} reads other weights than were saved"
                )
    return time.monotonic() - started_s


def _checkpoints(folder: Path, engine: Any) -> Checkpoints:
    return Checkpoints(folder, Writer(engine, in_background=True), keep=2, every_minutes=None)


def _engine(ds: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH))
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds)[0]
