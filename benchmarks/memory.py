"""Predicted against measured memory: real DeepSpeed engines on two CPU ranks, every allocation counted.

    python benchmarks/memory.py [--only NAME] [--out benchmarks/results/memory.json]

Each case assembles a stage as a worker does, makes two steps under torch's profiler, and compares what the
plan says with the bytes that torch's allocator gave out: after the engine is built, at the turn from forward
to backward, and at the step's peak.
"""

import argparse
import gc
import itertools
import json
import os
import random
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

from launcher import recipe as recipes  # noqa: E402
from launcher.facts import prepare_all  # noqa: E402
from launcher.plan import zero  # noqa: E402
from launcher.plan.plan import ModelFacts  # noqa: E402

NUM_RANKS = 2
LENGTH, ROWS = 128, 4
SIZES = {"small": (128, 2), "medium": (256, 4), "large": (512, 6)}
DS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
VOCABULARY = 4000


def model_config(arch: str, size: str) -> dict[str, Any]:
    """Return the config of a small model."""
    hidden, layers = SIZES[size]
    heads = hidden // 64
    stack = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    if arch == "llama":
        shape = {
            "num_key_value_heads": heads,
            "intermediate_size": hidden * 8 // 3,
            "tie_word_embeddings": False,
        }
        return {"model_type": "llama", **stack, **shape}
    if arch == "bert":
        return {"model_type": "bert", **stack, "intermediate_size": hidden * 4}
    return {
        "model_type": "t5",
        "d_model": hidden,
        "d_kv": 64,
        "d_ff": hidden * 2,
        "num_layers": layers // 2,
        "num_decoder_layers": layers // 2,
        "num_heads": heads,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }


TASKS = {"llama": "causal-lm", "bert": "text-classification", "t5": "translation"}


def recipe_of(arch: str, size: str, folder: Path, **stage: Any) -> dict[str, Any]:
    """Return a recipe whose every sample fills `LENGTH`."""
    return {
        "model": {
            "config": model_config(arch, size),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": stage.pop("dtype", "fp32"),
        },
        "stages": [
            {
                "name": "only",
                "task": TASKS[arch],
                "data": {"train": str(folder / f"{arch}.jsonl")},
                "steps": 2,
                "global_batch": ROWS * NUM_RANKS,
                "micro_batch": ROWS,
                "max_length": LENGTH,
                **stage,
            }
        ],
    }


def make_data(folder: Path) -> None:
    """Write texts longer than `LENGTH`, and a tokenizer."""
    from tests.conftest import make_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(VOCABULARY)]
    texts = [" ".join(draw.choices(words, k=LENGTH * 2)) for _ in range(64)]
    make_tokenizer(folder / "tokenizer", texts, VOCABULARY)
    rows = {
        "llama": [{"text": text} for text in texts],
        "bert": [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)],
        "t5": [{"source": text, "target": text} for text in texts],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def cases() -> list[dict[str, Any]]:
    """Return what is measured."""
    found = []
    for arch, size, ds in itertools.product(TASKS, SIZES, DS):
        for recomputes in (False, True):
            stage: dict[str, Any] = {"activation_checkpointing": recomputes}
            name = f"{arch}-{size}-{ds}" + ("-recompute" if recomputes else "")
            found.append({"name": name, "arch": arch, "size": size, "ds": ds, "stage": stage})
    for arch, ds in itertools.product(("llama", "bert"), ("zero1", "zero3")):
        lora = {"trainable": {"lora": {"rank": 8}}}
        found.append(
            {"name": f"{arch}-large-{ds}-lora", "arch": arch, "size": "large", "ds": ds, "stage": lora}
        )
    for arch, ds in itertools.product(("llama",), ("zero1", "zero2", "zero3", "zero3_offload")):
        found.append(
            {
                "name": f"{arch}-large-{ds}-bf16",
                "arch": arch,
                "size": "large",
                "ds": ds,
                "stage": {"dtype": "bf16"},
            }
        )
    return found


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
    """Measure jobs one after another on the same ranks; return what rank 0 found, by name."""
    from tests.conftest import free_port

    torch.multiprocessing.spawn(_rank, (free_port(), jobs, str(folder)), nprocs=NUM_RANKS)
    found: dict[str, dict[str, int]] = json.loads((folder / "measured.json").read_text())
    return found


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
        found[job["name"]] = measure(context_of(job, rank, Path(temp)))
        if rank == 0:
            print(job["name"], found[job["name"]], file=sys.stderr, flush=True)
    if rank == 0:
        (Path(temp) / "measured.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(context: Any) -> dict[str, int]:
    """Assemble a stage, make two steps; return bytes in use at the marks, and what is `left` when it is closed."""
    from launcher.assembly import assemble
    from launcher.part import in_lock_step

    gc.collect()
    plan, marks = context.plan.stages[0], {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        built = assemble(context, plan)
        gc.collect()
        held = {"built": storages()}
        batches = [in_lock_step(built.parts, step) for step in (1, 2)]
        backward = built.engine.engine.backward

        def marked(*args: Any, **kwargs: Any) -> Any:
            marks["turn"] = time.time_ns()
            result = backward(*args, **kwargs)
            marks["backward"] = time.time_ns()
            return result

        built.engine.engine.backward = marked
        built.engine.step(batches[0], 1e-4)
        gc.collect()
        marks["begin"] = time.time_ns()
        held["begin"] = storages()
        built.engine.step(batches[1], 1e-4)
        marks["end"] = time.time_ns()
        time.sleep(0.01)
    found = _at(profiler, marks, held["begin"])
    built.engine.close()
    gc.collect()
    return found | held | {"left": storages()}


def storages() -> int:
    """Return the bytes of all tensors that Python knows of."""
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _at(profiler: Any, marks: dict[str, int], begin: int) -> dict[str, int]:
    """Follow the allocator through the second step, which began with `begin` bytes in use.

    What was freed before by a thread of its own, the profiler has not seen.
    """
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    used, found = begin, {"backward_peak": begin, "update_peak": begin}
    for ns, change in sorted((e.start_ns(), e.nbytes()) for e in events):
        if not marks["begin"] <= ns <= marks["end"]:
            continue
        if ns > marks["turn"]:
            found.setdefault("turn", used)
        used += change
        name = "update_peak" if ns > marks["backward"] else "backward_peak"
        found[name] = max(found[name], used)
    return found | {"end": used, "peak": max(found["backward_peak"], found["update_peak"])}


def predict(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return the trace of a case's micro-batch, and what the plan says that it needs."""
    from launcher import footprint
    from launcher.plan import ds_memory, forecast, memory

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
    return trace, need


def compared(job: dict[str, Any], found: dict[str, int]) -> dict[str, Any]:
    """Return pairs (predicted, measured) in bytes."""
    trace, need = predict(job)
    whole = {item.name: item.bytes for item in need.items}
    always = sum(
        i.bytes for i in need.items if {"save", "compute"} <= set(i.phases) and i.name != "framework"
    )
    gathered = whole.get("gathered parameters", 0)
    return {
        "states": (always, found["begin"]),
        "activations": (trace.held + trace.outputs, found["turn"] - found["begin"] - gathered),
        "compute": (need.at("compute"), found["backward_peak"]),
        "update": (need.at("update"), found["update_peak"]),
        "peak": (max(need.at("compute"), need.at("update")), found["peak"]),
    }


def report(jobs: list[dict[str, Any]], measured: dict[str, Any], out: Path | None) -> None:
    """Print the comparison, and keep it."""
    rows = {}
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
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
