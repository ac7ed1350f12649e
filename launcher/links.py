"""How fast ranks exchange tensors: all-gather and reduce-scatter, inside a node and between nodes."""

import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = {"gloo": (1 << 20, 8 << 20, 32 << 20), "nccl": (16 << 20, 64 << 20, 256 << 20)}
_REPEATS = 5

Rates = dict[str, dict[str, dict[int, float]]]
"""By group, by collective, by bytes of the whole tensor: bytes/s that each rank sends and receives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and how the ranks meet.

    Attributes:
        nodes: of each rank, the number of its node; ranks of one node are neighbours.
        limit_s: of one collective, and of the meeting; sizes that would take too long are left out.
    """

    address: str
    port: int
    backend: str
    nodes: tuple[int, ...]
    limit_s: float


class Link:
    """One rank; the process may be used for one meeting."""

    def device(self) -> dict[str, Any]:
        """Return what torch sees of this rank's device."""
        if not torch.cuda.is_available():
            return {"name": None, "bytes": None, "cuda": torch.version.cuda}
        properties = torch.cuda.get_device_properties(0)
        return {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}

    def free_port(self) -> int:
        """Return a port of this node that nothing listens on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def measure(self, rank: int, meeting: Meeting) -> Rates:
        """Meet the other ranks and measure; all of them have to call this, and stay together."""
        world = len(meeting.nodes)
        os.environ.update(_environment(rank, meeting))
        dist.init_process_group(
            meeting.backend,
            init_method=f"tcp://{meeting.address}:{meeting.port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=meeting.limit_s),
        )
        rates: Rates = {}
        # All ranks make all groups, in the same order; those inside the nodes then measure at once.
        made = [(name, dist.new_group(list(members)), members) for name, members in groups(meeting.nodes)]
        for kind in ("all", "inside", "between"):
            for name, group, members in made:
                if name == kind and rank in members:
                    rates[name] = _rates(group, meeting)
            dist.barrier()
        return rates

    def rehearse(self, ds_config: dict[str, Any], folder: str) -> float:
        """Save and load step 0 of a small model with the ranks of the meeting; return the seconds.

        Raises:
            StorageError: it is not there, or not the same.
        """
        from launcher.train import rehearsal

        return rehearsal.save_and_load(ds_config, Path(folder))


def groups(nodes: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the groups to measure: all ranks; those of one node; one rank of each node.

    A group that would be the same as all ranks is left out.
    """
    ranks = tuple(range(len(nodes)))
    found = [("all", ranks)]
    by_node = [tuple(rank for rank in ranks if nodes[rank] == node) for node in dict.fromkeys(nodes)]
    found += [("inside", members) for members in by_node if 1 < len(members) < len(ranks)]
    between = tuple(members[0] for members in by_node)
    if 1 < len(between) < len(ranks):
        found.append(("between", between))
    return found if len(ranks) > 1 else []


def _environment(rank: int, meeting: Meeting) -> dict[str, str]:
    """What DeepSpeed asks of whoever starts its processes."""
    names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(meeting.nodes), "MASTER_PORT": meeting.port}
    found = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": meeting.address}
    return found | ({"DS_ACCELERATOR": "cpu"} if meeting.backend == "gloo" else {})


def _rates(group: Any, meeting: Meeting) -> dict[str, dict[int, float]]:
    device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
    members = dist.get_world_size(group)
    rates: dict[str, dict[int, float]] = {"all_gather": {}, "reduce_scatter": {}}
    for size in SIZES[meeting.backend]:
        shard = torch.ones(max(1, size // 4 // members), device=device)
        whole = torch.ones(shard.numel() * members, device=device)
        moved = shard.numel() * 4 * (members - 1)

        def gather(whole: torch.Tensor = whole, shard: torch.Tensor = shard) -> None:
            dist.all_gather_into_tensor(whole, shard, group=group)

        def scatter(whole: torch.Tensor = whole, shard: torch.Tensor = shard) -> None:
            dist.reduce_scatter_tensor(shard, whole, group=group)

        gather_s, scatter_s = _seconds(gather, device), _seconds(scatter, device)
        # torch's gloo has no reduce-scatter: it makes an all-reduce, which sends all twice.
        reduced = 2 * moved if meeting.backend == "gloo" else moved
        rates["all_gather"][size], rates["reduce_scatter"][size] = moved / gather_s, reduced / scatter_s
        # All have to stop at the same size, so the slowest one's time decides.
        slowest = torch.tensor([gather_s + scatter_s], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        if slowest.item() * 4 * (_REPEATS + 1) > meeting.limit_s / 6:
            break
    return rates


def _seconds(collective: Callable[[], Any], device: torch.device) -> float:
    """The median; the first time, which sets things up, does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])
