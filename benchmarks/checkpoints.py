"""How long training stands still for a checkpoint: copied and written beside it, written at once, and DeepSpeed's own.

    python benchmarks/checkpoints.py [--millions 34] [--rounds 5] [--out benchmarks/results/checkpoints.json]

Two CPU ranks train a Llama-shaped model; between steps each way saves once in every round, in turn. What is told is the
time in which no step can be made; beside it, how long until the checkpoint is there, and its bytes.
"""

import argparse
import json
import os
import shutil
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
import torch.distributed as dist  # noqa: E402

NUM_RANKS = 2
WAYS = ("beside training", "at once", "DeepSpeed")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=34, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from tests.conftest import free_port

    with tempfile.TemporaryDirectory() as temp:
        arguments = (free_port(), options.millions, options.rounds, options.stage, temp)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=NUM_RANKS)
        found = json.loads((Path(temp) / "found.json").read_text())
    for way, each in found["ways"].items():
        print(
            f"{way:<16} stall {each['stall_s']:.3f} s ({each['least_s']:.3f} to {each['most_s']:.3f}),"
            f" there after {each['there_s']:.2f} s, {each['bytes'] / 1e6:,.0f} MB"
        )
    stall = {way: each["stall_s"] for way, each in found["ways"].items()}
    print(
        f"beside training / at once: {stall[WAYS[0]] / stall[WAYS[1]]:.3f}; / DeepSpeed: {stall[WAYS[0]] / stall[WAYS[2]]:.3f}"
    )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _rank(rank: int, port: int, millions: int, rounds: int, stage: int, temp: str) -> None:
    from tests.conftest import join_ranks

    join_ranks(rank, NUM_RANKS, port)
    engine = _engine(millions, stage)
    savers = {way: _saver(way, engine, Path(temp) / way.replace(" ", "-")) for way in WAYS}
    told: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    _step(engine)
    for save in savers.values():
        save(0)  # Memory and files for the first time.
    for number in range(1, rounds + 1):
        for way, save in savers.items():
            _step(engine)
            dist.barrier()
            told[way].append(save(number))
    if rank == 0:
        found = {way: _summed(each) for way, each in told.items()}
        (Path(temp) / "found.json").write_text(
            json.dumps({"millions": millions, "zero_stage": stage, "ways": found})
        )
    dist.destroy_process_group()


def _engine(millions: int, stage: int) -> Any:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, layers = 512, max(1, round((millions - 8) / 3.2))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=8000,
    )
    model = AutoModelForCausalLM.from_config(config)
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds)[0]


def _step(engine: Any) -> None:
    tokens = torch.randint(0, 8000, (1, 64))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()


def _saver(way: str, engine: Any, folder: Path) -> Any:
    from launcher.train.checkpoint import Checkpoints
    from launcher.train.writer import Writer

    if way == "DeepSpeed":
        return lambda number: _deepspeed(engine, folder, number)
    told: list[dict[str, Any]] = []
    writer = Writer(engine, in_background=way == "beside training")
    checkpoints = Checkpoints(folder, writer, keep=2, every_minutes=None, told=told.append)

    def save(number: int) -> dict[str, float]:
        stall_s = checkpoints.save(number, {"fingerprint": "x", "position": number})
        checkpoints.wait()
        last = told[-1] if told else {"save_s": 0.0, "bytes": 0}
        return {"stall_s": stall_s, "there_s": last["save_s"], "bytes": last["bytes"]}

    return save


def _deepspeed(engine: Any, folder: Path, number: int) -> dict[str, float]:
    started_s = time.monotonic()
    engine.save_checkpoint(str(folder), tag=str(number))
    seconds = time.monotonic() - started_s
    dist.barrier()
    path = folder / str(number)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if dist.get_rank() == 0 and number > 1:
        shutil.rmtree(folder / str(number - 1), ignore_errors=True)
    return {"stall_s": seconds, "there_s": seconds, "bytes": total}


def _summed(each: list[dict[str, float]]) -> dict[str, float]:
    stalls = [one["stall_s"] for one in each]
    return {
        "stall_s": statistics.median(stalls),
        "least_s": min(stalls),
        "most_s": max(stalls),
        "there_s": statistics.median(one["there_s"] for one in each),
        "bytes": each[-1]["bytes"],
    }


if __name__ == "__main__":
    main()
