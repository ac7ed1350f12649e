"""What runs on each rank for test_checkpoint: legs of runs through real DeepSpeed engines."""

import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import LauncherError
from launcher.facts import Prepared
from launcher.plan import zero
from launcher.plan.plan import ModelFacts
from tests.conftest import ROOT, free_port, join_ranks
from tests.train import transfer_ranks as ranks


@dataclass(frozen=True)
class Leg:
    """Steps of a run, made by so many ranks under a ds config.

    Attributes:
        name: of the run directory; legs of one run share it.
        last: train to this step, and save there.
    """

    name: str
    num_ranks: int
    ds: str
    last: int
    tree: dict[str, Any]
    prepared: Prepared
    facts: ModelFacts
    folder: Path


def run(legs: list[Leg]) -> list[dict[str, Any]]:
    """Run legs of the same number of ranks one after another; return what rank 0 found in each."""
    (num_ranks,) = {leg.num_ranks for leg in legs}
    torch.multiprocessing.spawn(_rank, (num_ranks, free_port(), legs), nprocs=num_ranks)
    return [json.loads((leg.folder / leg.name / f"{leg.last}.json").read_text()) for leg in legs]


def _rank(rank: int, num_ranks: int, port: int, legs: list[Leg]) -> None:
    join_ranks(rank, num_ranks, port)
    for leg in legs:
        found = _leg(leg, rank)
        if rank == 0:
            (leg.folder / leg.name / f"{leg.last}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _leg(leg: Leg, rank: int) -> dict[str, Any]:
    from launcher.assembly import assemble
    from launcher.part import in_lock_step
    from launcher.train.checkpoint import Checkpoints
    from launcher.train.writer import Writer

    config = zero.load(str(ROOT / "ds_configs" / f"{leg.ds}.json"))
    run_dir = leg.folder / leg.name
    context = ranks.context(leg.tree, leg.ds, config, leg.facts, leg.prepared, run_dir, rank, leg.num_ranks)
    plan, told = context.plan.stages[0], []
    built = assemble(context, plan)
    writer = Writer(built.engine.engine, in_background=True)
    checkpoints = Checkpoints(run_dir / "checkpoints", writer, keep=2, every_minutes=None, told=told.append)
    try:
        start = checkpoints.restore(fingerprint=built.parts[0].fingerprint)
    except LauncherError as error:
        built.engine.close()
        return {"error": str(error)}
    losses, samples = [], []
    for step in range(start + 1, leg.last + 1):
        batches = in_lock_step(built.parts, step)
        losses.append(built.engine.step(batches, plan.schedule.lr(step)).loss)
        mine = [int(i) for micro_batch in batches[0].micro_batches for i in micro_batch.samples]
        every: list[Any] = [None] * leg.num_ranks
        torch.distributed.all_gather_object(every, mine)
        samples.append(sorted(i for part in every for i in part))
        checkpoints.save(step, {"fingerprint": built.parts[0].fingerprint, "position": step})
    checkpoints.wait()
    built.engine.close()
    return {"start": start, "losses": losses, "samples": samples, "saves": told}


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, f"ran at {time.time()}"))


def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))
