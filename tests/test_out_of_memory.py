"""A worker that runs out of memory: what is said, and going on with half the micro-batch. Real limits, real runs."""

import json
import resource
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_tokenizer
from tests.runs import Run

pytestmark = pytest.mark.timeout(600)
MORE_BYTES = 150_000_000
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose network keeps 160 MB for a micro-batch of 32, and takes half as much again backward."""
    folder = tmp_path_factory.mktemp("oom")
    texts = [" ".join(f"w{(i * 7 + j) % 3000}" for j in range(600)) for i in range(STEPS * 64)]
    make_tokenizer(folder / "tokenizer", texts, 4000)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"num_key_value_heads": 2, "intermediate_size": 600, "vocab_size": 4000}
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


def run_with_limit(recipe: Path, *arguments: str) -> Run:
    """Make a run; once rank 0 has begun the stage, leave it little more memory than it has."""
    run = Run(recipe, recipe.parent / "runs", "--workers", "2", "--no-fit-check", *arguments, ds="zero1.json")
    before = len(run.events("stage_begin"))
    run.start().wait_until(lambda: len(run.events("stage_begin")) > before, "a stage's begin")
    pid = run.events("stage_begin")[before]["pid"]
    limit = _data_bytes(pid) + MORE_BYTES
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    return run


def _data_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def test_without_memory_a_run_says_so_and_goes_on_with_half(recipe: Path) -> None:
    run = run_with_limit(recipe)
    code, output = run.end(), run.output()
    assert code == 7, output[-3000:]
    assert "stage only ran out of host memory on rank 0" in output
    assert "predicted" in output
    assert "micro-batch of 32 samples: on_oom: shrink goes on" in output
    run = run_with_limit(recipe, "--set", "on_oom=shrink")
    code, output = run.end(), run.output()
    assert code == 0, output[-3000:]
    assert "going on from the last checkpoint with half the micro-batch" in output
    run_dir = run.run_dir
    assert json.loads((run_dir / "halvings.json").read_text()) == {"only": 1}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["halvings"] == {"only": 1}
    assert summary["stages"]["only"]["steps"] == STEPS
    used = summary["stages"]["only"]["memory"]["host"]
    assert used["predicted"] > used["used"] * 0.5
    assert "memory of a worker: host" in output
