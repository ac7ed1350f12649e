"""The forecast against real engines: what two ranks hold and use is what was said; closing gives it back."""

import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory as bench
from launcher import recipe as recipes
from launcher.facts import prepare_all
from launcher.plan.plan import ModelFacts

pytestmark = pytest.mark.timeout(1200)

CASES = (
    ("llama", "zero2", {"trainable": {"lora": {"rank": 4}}}),
    ("llama", "zero3", {"activation_checkpointing": True}),
    ("t5", "zero3", {}),
)


def _rank(rank: int, port: int, jobs: list[dict[str, Any]], out: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(bench.NUM_RANKS))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=bench.NUM_RANKS
    )
    found = {}
    for job in jobs:
        found[job["name"]] = bench.measure(bench.context_of(job, rank, Path(out)))
        gc.collect()
        found[job["name"]]["left"] = bench.storages()
    torch.save(found, f"{out}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, (predicted, measured) bytes by what, and what is left when the engine is closed."""
    folder = tmp_path_factory.mktemp("memory")
    bench.make_data(folder)
    jobs = []
    for arch, ds, stage in CASES:
        tree = recipes.dump(recipes.parse(bench.recipe_of(arch, "small", folder, **stage)))
        facts = ModelFacts(hidden_size=bench.SIZES["small"][0])
        prepared = prepare_all(tree, facts, str(folder / "store"))
        name = f"{arch}-{ds}"
        jobs.append({"name": name, "ds": ds, "tree": tree, "facts": facts, "prepared": prepared})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, jobs, str(folder)), nprocs=bench.NUM_RANKS)
    found = torch.load(folder / "rank-0.pt", weights_only=False)
    return {
        job["name"]: bench.compared(job, found[job["name"]]) | {"left": found[job["name"]]["left"]}
        for job in jobs
    }


@pytest.mark.parametrize(("arch", "ds"), [case[:2] for case in CASES])
@pytest.mark.parametrize(("what", "tolerance"), [("states", 0.05), ("activations", 0.15), ("peak", 0.15)])
def test_what_is_used_is_what_was_said(
    compared: dict[str, Any], arch: str, ds: str, what: str, tolerance: float
) -> None:
    predicted, measured = compared[f"{arch}-{ds}"][what]
    assert predicted == pytest.approx(measured, rel=tolerance)


def test_a_closed_engine_gives_its_memory_back(compared: dict[str, Any]) -> None:
    assert max(each["left"] for each in compared.values()) < 100_000
