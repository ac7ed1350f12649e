"""Every shipped ds config: valid for the installed DeepSpeed, and trained by real engines on two CPU ranks."""

import json
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher import recipe as recipes
from launcher.assembly import Assembly, Context, assemble, write_export
from launcher.errors import DsConfigError
from launcher.facts import Prepared, prepare_all
from launcher.part import in_lock_step
from launcher.plan import zero
from launcher.plan.plan import ModelFacts, StagePlan
from tests.conftest import ROOT, free_port, join_ranks
from tests.plan.test_zero import ASKED
from tests.train import transfer_ranks as ranks

SHIPPED = ROOT / "ds_configs"
CONFIGS = sorted(path.stem for path in SHIPPED.glob("*.json"))
NUM_RANKS, STEPS = 2, 3
FACTS = ModelFacts(hidden_size=256, max_positions=256)
# Large enough that a rank's share of the optimizer goes to the disk: what is below 1 MiB stays in memory.
MODEL = {"hidden_size": 256, "intermediate_size": 512}
"""Over the configuration of `chat_setup`."""


def tree(setup: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {
            "config": setup["config"] | MODEL,
            "tokenizer": str(setup["tokenizer"]),
            "dtype": "fp32",
        },
        "stages": [
            {
                "name": "chat",
                "task": "causal-lm",
                "data": {"train": str(setup["train"])},
                "steps": STEPS,
                "global_batch": 6,
                "micro_batch": 1,
                "learning_rate": 1e-3,
                "warmup": 0,
                "max_length": 256,
                "seed": 3,
            }
        ],
    }


def load(name: str, disk: Path) -> dict[str, Any]:
    """Read a shipped config; where it uses a disk, give it one here, and buffers that fit the tiny model."""
    config = zero.load(str(SHIPPED / f"{name}.json"))
    section = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if section.get(key, {}).get("device") == "nvme":
            section[key]["nvme_path"] = str(disk)
            if key == "offload_param":
                section[key]["buffer_size"] = 1_000_000
    return config


def step(built: Assembly, plan: StagePlan, number: int) -> Any:
    return built.engine.step(in_lock_step(built.parts, number), plan.schedule.lr(number))


def trained(context: Context) -> dict[str, Any]:
    """Train with a checkpoint after the first step, and export; then go on from the checkpoint in a new engine."""
    plan = context.plan.stages[0]
    built = assemble(context, plan)
    checkpoints = ranks.checkpoints_of(context, built)
    results = [step(built, plan, 1)]
    checkpoints.save(1, {"fingerprint": "x"})
    results += [step(built, plan, number) for number in range(2, STEPS + 1)]
    checkpoints.wait()
    write_export(context, built.parts[-1], 0, built)
    found = {
        "optimizer": type(built.engine.engine.basic_optimizer).__name__,
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
    }
    built.engine.close()
    built = assemble(context, plan)
    start = ranks.checkpoints_of(context, built).restore(fingerprint="x")
    found["start"] = start
    found["resumed"] = [step(built, plan, number).loss for number in range(start + 1, STEPS + 1)]
    built.engine.close()
    return found


def _rank(
    rank: int, port: int, names: list[str], folder: str, tree: dict[str, Any], prepared: Prepared
) -> None:
    import time

    import torch.distributed as dist

    join_ranks(rank, NUM_RANKS, port)
    results: dict[str, Any] = {}
    for name in names:
        began_s = time.monotonic()
        try:
            config, run_dir = load(name, Path(folder) / "disk"), Path(folder) / name
            results[name] = trained(ranks.context(tree, name, config, FACTS, prepared, run_dir, rank))
        except Exception:
            raise RuntimeError(f"{name}: {traceback.format_exc()}") from None
        results[name]["seconds"] = time.monotonic() - began_s
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(chat_setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every config in one start of two processes; on a fresh machine this compiles DeepSpeed's CPU ops first."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "disk").mkdir()
    asked = recipes.dump(recipes.parse(tree(chat_setup)))
    prepared = prepare_all(asked, FACTS, str(folder / "store"))
    names = [name for name in CONFIGS if name != "zero3_nvme" or has_disk_op()]
    torch.multiprocessing.spawn(_rank, (free_port(), names, str(folder), asked, prepared), nprocs=NUM_RANKS)
    found = json.loads((folder / "rank-0.json").read_text())
    weights = {name: load_file(folder / name / "stages/chat/export/model.safetensors") for name in names}
    return {name: found[name] | {"weights": weights[name]} for name in names}


def has_disk_op() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=CONFIGS)
def run(request: pytest.FixtureRequest, runs: dict[str, Any]) -> dict[str, Any]:
    if request.param not in runs:
        pytest.skip("libaio's headers are not installed")
    return {"name": request.param} | runs[request.param]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_norms_and_export_are_those_of_zero0(run: dict[str, Any], runs: dict[str, Any]) -> None:
    plain = runs["zero0"]
    print(f"{run['name']}: {run['seconds']:.1f} s, losses {largest(run['losses'], plain['losses']):.1e}")
    assert largest(run["losses"], plain["losses"]) < 1e-4
    assert largest(run["norms"], plain["norms"]) < 1e-4
    assert run["weights"].keys() == plain["weights"].keys()
    for name, value in plain["weights"].items():
        assert torch.allclose(run["weights"][name], value, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_engine_goes_on_from_the_checkpoint(run: dict[str, Any]) -> None:
    assert run["start"] == 1
    assert run["resumed"] == run["losses"][1:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_offload_uses_the_cpu_adam_of_deepspeed(run: dict[str, Any]) -> None:
    is_offloaded = "offload_optimizer" in zero.load(str(SHIPPED / f"{run['name']}.json"))["zero_optimization"]
    assert run["optimizer"] == ("DeepSpeedCPUAdam" if is_offloaded else "AdamW")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_valid_for_the_installed_deepspeed(name: str, device: str, asked: zero.Asked) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    path = str(SHIPPED / f"{name}.json")
    config = zero.load(path)
    zero.check(config, path)
    wish = replace(asked, device=device)
    zero.contradictions(zero.given(config), wish, path, "chat")
    full = zero.complete(config, wish)
    parsed = DeepSpeedConfig(full).zero_config
    # What was written arrived: a key that pydantic knows by another name would be left at its default.
    for key, value in full["zero_optimization"].items():
        if not isinstance(value, dict):
            assert getattr(parsed, key.removeprefix("stage3_")) == value, key


@pytest.fixture
def asked() -> zero.Asked:
    """One worker, as the test's own process is one."""
    written = frozenset({"global_batch", "learning_rate", "dtype"})
    return replace(
        ASKED, micro_batch=1, accumulation=1, num_workers=1, global_batch=1, hidden_size=4096, written=written
    )


def test_hpz_wants_whole_machines(asked: zero.Asked) -> None:
    given = zero.given(zero.load(str(SHIPPED / "zero3_multinode.json")))
    for workers in (1, 2, 8, 24):
        zero.contradictions(given, replace(asked, num_workers=workers), "x.json", "chat")
    with pytest.raises(DsConfigError, match="zero_hpz_partition_size is 8, which does not divide 12 workers"):
        zero.contradictions(given, replace(asked, num_workers=12), "x.json", "chat")


def test_the_readme_tells_of_every_config() -> None:
    text = (SHIPPED / "README.md").read_text()
    missing = [name for name in CONFIGS if f"| `{name}.json` |" not in text]
    assert missing == []
