"""Predicted against measured memory: real DeepSpeed engines on two CPU ranks, every allocation counted.

    python benchmarks/memory.py [--only NAME] [--out benchmarks/results/memory.json]

Each case assembles a stage as a worker does, follows a step under torch's profiler, and compares what the plan
says with the bytes that torch's allocator gave out: before the step, at the turn from forward to backward, and
at the peaks of backward and update. Results are added to those that the file has.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.memory_cases import MOST_STEPS, NUM_RANKS, SIZES, cases, make_data, recipe_of  # noqa: E402
from launcher import recipe as recipes  # noqa: E402
from launcher.facts import prepare_all  # noqa: E402
from launcher.plan import zero  # noqa: E402
from launcher.plan.plan import ModelFacts  # noqa: E402


def main() -> None:
    """Measure all cases, print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a part of the names of the cases to run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        make_data(folder)
        wanted = [
            case for case in cases() if not options.only or any(part in case["name"] for part in options.only)
        ]
        jobs = [job_of(case, folder) for case in wanted]
        report(jobs, measured(jobs, folder), options.out)


def job_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prepare a case: `name`, `arch`, `size`, `ds`, what its `stage` says beyond the usual, perhaps a `team`."""
    tree = recipes.dump(recipes.parse(recipe_of(case["arch"], case["size"], folder, **case["stage"])))
    facts = ModelFacts(hidden_size=SIZES[case["size"]][0])
    return case | {"tree": tree, "facts": facts, "prepared": prepare_all(tree, facts, str(folder / "store"))}


def measured(jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, int]]:
    """Measure jobs one after another on the same ranks; return what the rank with most found, by name."""
    from tests.conftest import free_port

    torch.multiprocessing.spawn(_rank, (free_port(), jobs, str(folder)), nprocs=NUM_RANKS)
    found: dict[str, dict[str, int]] = json.loads((folder / "measured.json").read_text())
    return found


def most_of_all(found: dict[str, int]) -> dict[str, int]:
    """Return of each number the largest that a rank has; every rank must call it."""
    values = torch.tensor(list(found.values()))
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(found, values.tolist(), strict=True))


def context_of(job: dict[str, Any], rank: int, folder: Path) -> Any:
    """Return what a worker would hold."""
    from tests.train import transfer_ranks as ranks

    name = job["ds"]
    ds = zero.load(str(ROOT / "ds_configs" / f"{name}.json")) | {"sequence_parallel_size": job.get("team", 1)}
    return ranks.context(
        job["tree"], name, ds, job["facts"], job["prepared"], folder / job["name"], rank, NUM_RANKS
    )


def _rank(rank: int, port: int, jobs: list[dict[str, Any]], temp: str) -> None:
    from tests.conftest import join_ranks

    join_ranks(rank, NUM_RANKS, port)
    log = os.open(Path(temp) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    found = {}
    for job in jobs:
        found[job["name"]] = most_of_all(measure(context_of(job, rank, Path(temp))))
        if rank == 0:
            print(job["name"], found[job["name"]], file=sys.stderr, flush=True)
    if rank == 0:
        (Path(temp) / "measured.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(context: Any) -> dict[str, int]:
    """Assemble a stage and follow a step after the first.

    A tensor that gloo's threads free is not seen to go. A step that seems to end with 1 % more than it began
    with is therefore made again.

    Returns:
        Bytes in use at the marks, and what is `left` when the engine is closed.
    """
    from launcher.assembly import assemble
    from launcher.part import in_lock_step

    gc.collect()
    plan = context.plan.stages[0]
    built = assemble(context, plan)
    gc.collect()
    found = {"built": storages()}
    batches = [in_lock_step(built.parts, step) for step in range(1, MOST_STEPS + 1)]
    built.engine.step(batches[0], 1e-4)
    for batch in batches[1:]:
        step = followed(built.engine, batch)
        if "end" not in found or abs(step["end"] - step["begin"]) < abs(found["end"] - found["begin"]):
            found |= step
        told = torch.tensor(abs(found["end"] / found["begin"] - 1.0))
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if told.item() < 0.01:
            break
    built.engine.close()
    gc.collect()
    return found | {"left": storages()}


def followed(engine: Any, batch: Any) -> dict[str, int]:
    """Make one step; return bytes in use at the marks."""
    marks: dict[str, int] = {}
    backward = engine.engine.backward

    gathered = 0

    def marked(*args: Any, **kwargs: Any) -> Any:
        nonlocal gathered
        gathered = sum(p.numel() * p.element_size() for p in engine.parts.parameters() if _comes_and_goes(p))
        marks["turn"] = time.time_ns()
        result = backward(*args, **kwargs)
        marks["backward"] = time.time_ns()
        return result

    engine.engine.backward = marked
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        gc.collect()
        begin = storages()
        marks["begin"] = time.time_ns()
        engine.step(batch, 1e-4)
        marks["end"] = time.time_ns()
        time.sleep(0.01)
    engine.engine.backward = backward
    return _at(profiler, marks, begin) | {"gathered": gathered}


def _comes_and_goes(parameter: Any) -> bool:
    """Whether ZeRO-3 gathers a parameter when it is used; it is empty when it is not whole."""
    return hasattr(parameter, "ds_id") and not parameter.ds_persist


def storages() -> int:
    """Return the bytes of all tensors that Python knows of.

    Those on the meta device have none, though their storages say so: DeepSpeed's ZeRO-1 and 2 keep one for each
    parameter (`round_robin_bit16_meta`).
    """
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and not each.is_meta:
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _at(profiler: Any, marks: dict[str, int], begin: int) -> dict[str, int]:
    """Follow the allocator through a step, which began with `begin` bytes in use."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    used, found = begin, {"begin": begin, "backward_peak": begin, "update_peak": 0}
    for ns, change in sorted((e.start_ns(), e.nbytes()) for e in events):
        if not marks["begin"] <= ns <= marks["end"]:
            continue
        if ns > marks["turn"]:
            found.setdefault("turn", used)
        is_update = ns > marks["backward"]
        if is_update:
            found["update_peak"] = max(found["update_peak"], used)
        used += change
        name = "update_peak" if is_update else "backward_peak"
        found[name] = max(found[name], used)
    return found | {"end": used, "peak": max(found["backward_peak"], found["update_peak"])}


def predict(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return the trace of a case's micro-batch, and what the plan says that it needs."""
    from launcher import footprint
    from launcher.plan import ds_memory, forecast, memory
    from launcher.plan.need import Need

    plan, recipe = context_of(job, 0, Path()).plan, recipes.parse(job["tree"])
    stage = plan.stages[0]
    shapes = footprint.of_stage(recipe, stage, job["prepared"].facts, dtype=plan.dtype, device="cpu")
    trace = forecast.traced(stage, shapes)
    sharding = ds_memory.sharding(stage.ds, plan.dtype)
    need = memory.of_stage(
        shapes,
        trace,
        sharding,
        num_workers=NUM_RANKS,
        accumulation=stage.accumulation,
        device="cpu",
    )
    # No checkpoint is made here.
    return trace, Need(tuple(item for item in need.items if item.name != memory.CHECKPOINT_COPY))


def compared(job: dict[str, Any], found: dict[str, int]) -> dict[str, Any]:
    """Return pairs (predicted, measured) in bytes."""
    trace, need = predict(job)
    always = sum(
        i.bytes for i in need.items if {"save", "compute"} <= set(i.phases) and i.name != "framework"
    )
    return {
        "states": (always, found["begin"]),
        "activations": (trace.held + trace.outputs, found["turn"] - found["begin"] - found["gathered"]),
        "compute": (need.at("compute"), found["backward_peak"]),
        "update": (need.at("update"), found["update_peak"]),
        "peak": (max(need.at("compute"), need.at("update")), found["peak"]),
    }


def report(jobs: list[dict[str, Any]], measured: dict[str, Any], out: Path | None) -> None:
    """Print the comparison, and keep it beside that of other cases."""
    rows = json.loads(out.read_text()) if out and out.exists() else {}
    for job in jobs:
        pairs = compared(job, measured[job["name"]])
        rows[job["name"]] = {
            name: {"predicted": a, "measured": b, "ratio": round(a / max(1, b), 3)}
            for name, (a, b) in pairs.items()
        }
        cells = "  ".join(
            f"{name} {a / 1e6:7.2f}/{b / 1e6:7.2f} {a / max(1, b):5.2f}" for name, (a, b) in pairs.items()
        )
        print(f"{job['name']:36} {cells}", flush=True)
    print(summary(rows))
    if out:
        lines = [f" {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def summary(rows: dict[str, Any]) -> str:
    """Return a table of the ratios of predicted to measured: by what was compared, over all cases."""
    lines = [f"| {'':12} | cases | median | lowest | highest |", "| --- | --- | --- | --- | --- |"]
    for name in next(iter(rows.values())):
        ratios = sorted(row[name]["ratio"] for row in rows.values())
        middle = statistics.median(ratios)
        lines.append(f"| {name:12} | {len(ratios)} | {middle:.3f} | {ratios[0]:.3f} | {ratios[-1]:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
