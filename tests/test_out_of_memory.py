"""A worker that runs out of memory: what is said, and going on with half the micro-batch. Real limits, real runs."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, make_tokenizer

pytestmark = pytest.mark.timeout(600)
MORE_BYTES = 150_000_000
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose logits alone take 250 MB for a micro-batch of 32."""
    folder = tmp_path_factory.mktemp("oom")
    texts = [" ".join(f"w{(i * 7 + j) % 3000}" for j in range(600)) for i in range(STEPS * 64)]
    make_tokenizer(folder / "tokenizer", texts, 4000)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 4000}
    stage = {
        "name": "only",
        "task": "causal-lm",
        "data": {"train": str(folder / "train.jsonl")},
        "steps": STEPS,
    }
    sizes = {"global_batch": 64, "micro_batch": 32, "max_length": 512, "batching": "random"}
    tree = {
        "model": {"config": config | shape, "tokenizer": str(folder / "tokenizer"), "dtype": "fp32"},
        "stages": [stage | sizes],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def _begun(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in events if event["kind"] == "stage_begin"]


def _run_with_limit(recipe: Path, *arguments: str) -> tuple[int, str]:
    """Start a run; once rank 0 has begun the stage, leave it little more memory than it has. Return its end."""
    runs = recipe.parent / "runs"
    command = [
        sys.executable,
        "launcher/run.py",
        str(recipe),
        "--ds",
        "ds_configs/zero1.json",
        "--workers",
        "2",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    before = len(_begun(runs / "it"))
    process = subprocess.Popen(
        [*command, "--run-root", str(runs), "--name", "it", "--no-fit-check", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 200
    while len(_begun(runs / "it")) == before and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is None:
        pid = int(str(_begun(runs / "it")[before]["pid"]))
        limit = _data_bytes(pid) + MORE_BYTES
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def _data_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def test_without_memory_a_run_says_so_and_goes_on_with_half(recipe: Path) -> None:
    code, output = _run_with_limit(recipe)
    assert code == 7, output[-3000:]
    assert "stage only ran out of host memory on rank 0" in output
    assert "predicted" in output
    assert "micro-batch of 32 samples: on_oom: shrink goes on" in output
    code, output = _run_with_limit(recipe, "--set", "on_oom=shrink")
    assert code == 0, output[-3000:]
    assert "going on from the last checkpoint with half the micro-batch" in output
    run_dir = recipe.parent / "runs" / "it"
    assert json.loads((run_dir / "halvings.json").read_text()) == {"only": 1}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["halvings"] == {"only": 1}
    assert summary["stages"]["only"]["steps"] == STEPS
    used = summary["stages"]["only"]["memory"]["host"]
    assert used["predicted"] > used["used"] * 0.5
    assert "memory of a worker: host" in output
