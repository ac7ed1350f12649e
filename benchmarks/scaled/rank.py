"""One rank: a process that builds a stage as a worker does, and makes steps when it is told to.

    python benchmarks/scaled/rank.py RANK WORLD ADDRESS PORT INTERFACE JOBS

JOBS is a pickled file of `work.Job`, by name. Orders come as lines of JSON, answers go back in the same way.
"""

import gc
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.scaled.collectives import Tally
from benchmarks.scaled.work import Job


class Rank:
    """The process's state between orders."""

    def __init__(self, rank: int, world: int, interface: str, jobs: dict[str, Job]) -> None:
        self.rank, self.world, self.interface, self.jobs = rank, world, interface, jobs
        self.built: Any = None
        self.next_step = 1
        self.tally = Tally()

    def build(self, name: str) -> dict[str, Any]:
        """Close what there is, and assemble a job; its first steps, in which DeepSpeed learns the order of modules."""
        from launcher.assembly import assemble

        if self.built is not None:
            self.built.engine.close()
            self.built = None
            gc.collect()
        context = self.jobs[name].context(self.rank, self.world)
        self.built, self.next_step = assemble(context, context.plan.stages[0]), 1
        self.steps(3)
        return {}

    def steps(self, number: int) -> dict[str, Any]:
        """Make steps.

        Returns:
            Of each `seconds` and `waited` (in collectives), and the number of `tokens`; of all `calls` and `bytes`
            by collective, and what the interface `sent`.
        """
        from launcher.part import in_lock_step

        self.tally.begin()
        before, seconds, waited, tokens = self._sent(), [], [], []
        for step in range(self.next_step, self.next_step + number):
            batches = in_lock_step(self.built.parts, step)
            waited_s = self.tally.waited_s
            begun_s = time.perf_counter()
            self.built.engine.step(batches, 1e-4)
            seconds.append(time.perf_counter() - begun_s)
            waited.append(self.tally.waited_s - waited_s)
            tokens.append(batches[-1].num_targets)
        self.next_step += number
        calls, counted, sent = dict(self.tally.calls), dict(self.tally.bytes), self._sent() - before
        return {
            "seconds": seconds,
            "waited": waited,
            "tokens": tokens,
            "calls": calls,
            "bytes": counted,
            "sent": sent,
        }

    def _sent(self) -> int:
        # Of this process's own network namespace.
        lines = Path("/proc/net/dev").read_text().splitlines()
        return next(
            int(line.split(":")[1].split()[8])
            for line in lines
            if line.split(":")[0].strip() == self.interface
        )


def main() -> None:
    """Join the others, and do what comes in."""
    rank, world, (address, port, interface, path) = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(GLOO_SOCKET_IFNAME=interface, MASTER_ADDR=address, MASTER_PORT=port)
    with open(path, "rb") as file:
        state = Rank(rank, world, interface, pickle.load(file))
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=world)
    for line in sys.stdin:
        order = json.loads(line)
        found = getattr(state, order.pop("do"))(**order)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
