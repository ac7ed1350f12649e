"""The launcher's stage on ranks that torchrun has started: all that a worker does, without Ray around it."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from peers import work as works


def _context(work: works.Work, stage: int, steps: int, recorder: Any, *, has_flops: bool = False) -> Any:
    from launcher.assembly import Context
    from launcher.plan import zero
    from launcher.plan.plan import World, make_plan

    recipe, facts, prepared = works.prepared_of(work.recipe, work.folder)
    recipe = recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"steps": steps})]})
    config = zero.load(str(works.ROOT / "ds_configs" / f"zero{stage}.json"))
    on_gpu = work.device == "gpu"
    world = World(num_workers=dist.get_world_size(), device="cuda" if on_gpu else "cpu")
    return Context(
        recipe=recipe,
        plan=make_plan(recipe, config, f"zero{stage}", facts, prepared.facts, world),
        prepared=prepared,
        run_dir=Path(work.folder) / "run",
        rank=dist.get_rank(),
        device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        recorder=recorder,
        samples=None,
        token_flops=_token_flops(recipe, config, facts, prepared.facts) if has_flops else {},
    )


def _token_flops(recipe: Any, config: dict[str, Any], model_facts: Any, facts: Any) -> dict[str, Any]:
    """The model's operations for a token, as the launcher's driver forecasts them; the machine is the same for all."""
    from launcher.forecasts import Forecaster
    from launcher.plan import cluster

    machine = cluster.parse(f"{dist.get_world_size()}xCPU-64GB")
    found = Forecaster(model_facts, facts)(recipe, "it", config, machine)
    return {each.name: each.token_flops for each in found}


def part_of(work: works.Work) -> Any:
    """Return what a worker of the launcher has of the stage's data."""
    from launcher.part import Part, Seat
    from launcher.report.record import Recorder
    from launcher.train import model as models

    context = _context(work, 2, 10_000, Recorder(None))
    seat = Seat(context.rank, dist.get_world_size(), work.pad_token_id)
    tokenizer = models.load_tokenizer(context.recipe.model)
    return Part(context.recipe.stages[0], context.plan.stages[0], context.prepared.facts[0], tokenizer, seat)


def run(work: works.Work, stage: int, steps: int, record: Any) -> None:
    """Run it, with its record written to a file as on a cluster, and what it stands in collectives tallied."""
    from launcher.report.record import Recorder
    from launcher.stage import StageRun
    from launcher.train import usage
    from peers.loops import counted

    folder, seen = Path(work.folder) / "run", {}
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()

    class Counted(StageRun):
        def make(self, step: int) -> Any:
            batches = super().make(step)
            counts = [counted(work, each.features) for each in batches[0].micro_batches]
            seen[step] = [sum(each) for each in zip(*counts, strict=True)]
            return batches

        def record(self, batches: Any, result: Any) -> None:
            super().record(batches, result)
            record.tokens[-1], record.slots[-1] = seen.pop(batches[0].step)
            record.losses.append(result.loss)
            record.waits.append(record.tally.waited_s)
            record.tally.begin()
            record.step()

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "stage_begin":
            record.begin = event

    recorder = Recorder(folder / "metrics.jsonl" if dist.get_rank() == 0 else None, listen)
    context = _context(work, stage, steps, recorder, has_flops=dist.get_rank() == 0)
    it = Counted(context, context.plan.stages[0], usage.Watch(context.device))
    record.start()
    record.tally.begin()
    it.run()
