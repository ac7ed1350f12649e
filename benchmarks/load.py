"""Memory while a model is loaded: one of a billion parameters on two CPU ranks, whole and under ZeRO-3.

    python benchmarks/load.py [--millions 1000] [--only zero3-bf16] [--out benchmarks/results/load.json]

A random model is written once, shard by shard, in bf16. Then two ranks load it as a stage does, for each case in
fresh processes, and watch their own memory: anonymous pages, which are theirs alone, and pages of mapped files,
which all processes share and the kernel takes back when it needs to.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Freed memory goes back at once, so that what a process has is what it uses.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks.memory import storages  # noqa: E402
from launcher.plan import ds_memory, memory, zero  # noqa: E402
from launcher.plan.plan import ModelFacts, Plan, SplitFacts, StageFacts, World, make_plan  # noqa: E402
from launcher.plan.shapes import Parameter, Shapes, Trace  # noqa: E402
from launcher.recipe import parse  # noqa: E402

NUM_RANKS = 2
SHARD_BYTES = 256 * 2**20
CASES = tuple(
    (ds, dtype) for ds in ("zero0", "zero2", "zero3", "zero3_offload") for dtype in ("bf16", "fp32")
)
POLL_S = 0.002


def config_of(millions: int) -> transformers.LlamaConfig:
    """Return the config of a model with about so many million parameters."""
    hidden, vocabulary = (2048, 32_000) if millions >= 500 else (1024, 8_000)
    # Attention and MLP of a layer have 12 x hidden x hidden.
    layers = max(1, round((millions * 1_000_000 - 2 * vocabulary * hidden) / (12 * hidden * hidden)))
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def skeleton_of(config: Any) -> Any:
    """Return the model without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def make_model(folder: Path, millions: int) -> None:
    """Write random weights in bf16, at most one shard of them in memory."""
    config = config_of(millions)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    draw, shards, pending = torch.Generator().manual_seed(0), 0, {}
    where: dict[str, str] = {}
    names = dict(skeleton_of(config).named_parameters())
    for i, (name, parameter) in enumerate(names.items()):
        pending[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=draw)
        if sum(each.nbytes for each in pending.values()) > SHARD_BYTES or i == len(names) - 1:
            file = f"model-{shards:05d}.safetensors"
            save_file(pending, str(folder / file), metadata={"format": "pt"})
            where |= dict.fromkeys(pending, file)
            shards, pending = shards + 1, {}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def plan_of(ds_name: str, dtype: str, folder: Path, hidden: int) -> Plan:
    """Return the plan of a run that trains the model."""
    tree = {
        "model": {"path": str(folder), "dtype": dtype},
        "stages": [
            {
                "name": "only",
                "task": "causal-lm",
                "data": {"train": "rows.jsonl"},
                "steps": 1,
                "micro_batch": 1,
                "global_batch": NUM_RANKS,
            }
        ],
    }
    split = SplitFacts(about_rows=1000, num_samples=1000, is_settled=True)
    return make_plan(
        parse(tree),
        zero.load(str(ROOT / "ds_configs" / f"{ds_name}.json")),
        ds_name,
        ModelFacts(hidden_size=hidden),
        (StageFacts(train=split, eval=None),),
        World(num_workers=NUM_RANKS, device="cpu"),
    )


class Gauge:
    """Watches this process's memory in a thread.

    Attributes:
        anonymous, mapped: bytes at most, beyond what there was when it began.
    """

    def __init__(self) -> None:
        """Begin."""
        self.anonymous = self.mapped = 0
        self._begun, self._is_over = resident(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching."""
        self._is_over = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over:
            anonymous, mapped = resident()
            self.anonymous = max(self.anonymous, anonymous - self._begun[0])
            self.mapped = max(self.mapped, mapped - self._begun[1])
            time.sleep(POLL_S)


def resident() -> tuple[int, int]:
    """Return the bytes of this process's anonymous pages, and of its pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


def loaded(plan: Plan, folder: Path, dtype: str) -> tuple[Any, dict[str, int]]:
    """Load the model as a stage does; return it, and bytes that the rank has taken."""
    from launcher.recipe import Model
    from launcher.train import model as models

    gc.collect()
    gauge, begun = Gauge(), storages()
    model, _ = models.load(
        Model(path=str(folder)),
        str(folder),
        "AutoModelForCausalLM",
        options={},
        head=models.HeadStart(kind="keep", directory=None, seed=0, stage="only"),
        dtype=dtype,
        ds=plan.stages[0].ds,
    )
    gauge.end()
    gc.collect()
    held = storages() - begun
    return model, {"peak": gauge.anonymous, "mapped": gauge.mapped, "held": held}


def is_same(model: Any, folder: Path) -> bool:
    """Whether the model holds what the files do; every rank must call it."""
    from launcher.train.model import gathered

    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, parameter in model.named_parameters():
        with gathered([parameter]), safe_open(str(folder / where[name]), "pt") as file:
            if not torch.equal(parameter, file.get_tensor(name).to(parameter.dtype)):
                return False
    return True


def _rank(rank: int, port: int, case: tuple[str, str], folder: Path, hidden: int, out: Path) -> None:
    from tests.conftest import join_ranks

    join_ranks(rank, NUM_RANKS, port)
    log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What the libraries take for themselves when they are first used is not the model's.
    torch.distributed.all_reduce(torch.ones(1))
    import deepspeed  # noqa: F401

    skeleton_of(transformers.AutoConfig.from_pretrained(folder))
    model, found = loaded(plan_of(*case, folder, hidden), folder, case[1])
    found["is_same"] = is_same(model, folder)
    (out / f"{'-'.join(case)}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(case: tuple[str, str], folder: Path, hidden: int, out: Path) -> list[dict[str, int]]:
    """Load in fresh processes; return what each rank found."""
    from tests.conftest import free_port

    torch.multiprocessing.spawn(_rank, (free_port(), case, folder, hidden, out), nprocs=NUM_RANKS)
    return [json.loads((out / f"{'-'.join(case)}-{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def predicted(case: tuple[str, str], plan: Plan, config: Any) -> tuple[int, int]:
    """Return what the plan says: bytes of anonymous memory while loading, and the whole model's."""
    found = [Parameter(name, p.numel(), 0) for name, p in skeleton_of(config).named_parameters()]
    nothing = Trace(rows=1, length=1, held=0, outputs=0, curve=((0, 0),), flops=1)
    shapes = Shapes(
        parameters=tuple(found),
        visits=tuple((i,) for i in range(len(found))),
        buffers=0,
        plain=nothing,
        checkpointed=None,
    )
    settings = ds_memory.sharding(plan.stages[0].ds, case[1])
    need = memory.of_stage(shapes, nothing, settings, num_workers=NUM_RANKS, accumulation=1, device="cpu")
    # The forecast's phase goes on to the engine, which lays weights side by side; this stops before.
    said = sum(i.bytes for i in need.items if "load" in i.phases and i.name != "weights as loaded")
    return said, settings.bytes * shapes.num_trained


def compared(case: tuple[str, str], folder: Path, out: Path) -> dict[str, Any]:
    """Return what was said and what was found of one case, in bytes and as shares of the whole model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    hidden = config.hidden_size
    said, whole = predicted(case, plan_of(*case, folder, hidden), config)
    ranks = measured(case, folder, hidden, out)
    # Weights of the files' own dtype stay mapped without ZeRO-3: only what is held tells of them.
    peak = max(max(each["peak"], each["held"]) for each in ranks)
    return {
        "whole": whole,
        "predicted": said,
        "ranks": ranks,
        "peak of whole": round(max(each["peak"] for each in ranks) / whole, 3),
        "held of whole": round(max(each["held"] for each in ranks) / whole, 3),
        "predicted of measured": round(said / max(1, peak), 3),
    }


def main() -> None:
    """Measure all cases, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=1000, help="parameters of the model")
    parser.add_argument("--only", action="append", default=[], help="a part of the names of the cases to run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "model"
        make_model(folder, options.millions)
        for case in CASES:
            name = "-".join(case)
            if options.only and not any(part in name for part in options.only):
                continue
            rows[name] = compared(case, folder, Path(temp))
            print(name, rows[name], flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
