"""What is said before a run: a 7B model on machines where it fits, and where it does not."""

import json
from pathlib import Path

import pytest

from launcher import ahead, run
from tests.conftest import ROOT

SEVEN_B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 100)
    lines = [
        f"model: {{config: {json.dumps(SEVEN_B)}, tokenizer: unused}}",
        "stages:",
        "  - {name: chat, task: causal-lm, data: {train: rows.jsonl}, max_length: 2048, micro_batch: 2,",
        "     global_batch: 32, steps: 1000}",
    ]
    (tmp_path / "big.yaml").write_text("\n".join(lines))
    return tmp_path / "big.yaml"


def _plan(recipe: Path, machines: str, *more: str, ds: str = str(ROOT / "ds_configs" / "zero3.json")) -> int:
    roots = ["--run-root", str(recipe.parent / "runs"), "--name", "plan"]
    return run.main([str(recipe), "--plan", "--cluster", machines, "--ds", ds, *roots, *more])


def _kept(recipe: Path) -> dict:
    return json.loads((recipe.parent / "runs" / "plan" / "plan.json").read_text())


def test_a_run_that_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(recipe, "2x8xH100-80GB,price=50") == 0
    said = capsys.readouterr().out
    assert "verdict: it fits" in said and "at 100.00 an hour" in said
    kept = _kept(recipe)
    stage = kept["stages"]["chat"]
    assert kept["fits"] and stage["num_steps"] == 1000
    # 2 all-gathers and a reduce-scatter of 6.74 B bf16 weights, 15/16 of each; but the last 1 B weights of the
    # forward are still there when the backward begins (stage3_max_live_parameters).
    assert stage["sent_bytes_per_step"] == pytest.approx((3 * 6.74e9 - 1e9) * 2 * 15 / 16, rel=0.01)
    # 6 operations a parameter and token, and attention.
    assert stage["flops_per_step"] == pytest.approx(32 * 2048 * 6 * 6.74e9, rel=0.15)
    assert all(item["why"] for item in stage["items"])


def test_a_plan_for_other_machines_is_kept_beside_that_of_a_run(recipe: Path) -> None:
    assert _plan(recipe, "8xH100-80GB") == 0
    mine = _kept(recipe)
    (recipe.parent / "runs" / "plan" / "recipe.yaml").touch()  # It has begun.
    assert _plan(recipe, "2x8xH100-80GB,price=50") == 0
    assert _kept(recipe) == mine
    asked = json.loads((recipe.parent / "runs" / "plan" / "plan-asked.json").read_text())
    assert asked["cluster"]["price_per_hour"] == 100


def test_a_price_is_of_one_node(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(recipe, "2x8xH100-80GB", "--price", "50") == 0
    assert _kept(recipe)["cluster"]["price_per_hour"] == 100
    assert ahead.price_of(recipe.parent / "runs" / "plan") == 50, "what goes on costs the same"
    assert ahead.price_of(recipe.parent) is None
    assert _plan(recipe, "4x8xH100-80GB,price=50", "--workers", "8") == 0
    assert _kept(recipe)["cluster"]["price_per_hour"] == 50, "one node is taken"
    with pytest.raises(SystemExit):
        _plan(recipe, "8xH100-80GB", "--price", "cheap")
    assert "cheap is not a price" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_told_what_would(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(recipe, "1xA100-80GB,host=300GB") == 2
    said = capsys.readouterr().out
    assert "verdict: it does not fit: each GPU needs" in said
    would = [line for line in said.splitlines() if line.startswith("  would fit: ")]
    assert 1 <= len(would) <= 3 and any("offload" in line for line in would)
    assert any("workers" in line for line in would)


def test_auto_takes_what_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(recipe, "1xA100-80GB,host=300GB", ds="auto") == 0
    assert "offload" in _kept(recipe)["ds"]
    assert _plan(recipe, "8xH100-80GB", ds="auto") == 0
    said = capsys.readouterr().out
    assert "--ds auto takes" in said and "offload" not in _kept(recipe)["ds"]
    assert _plan(recipe, "1xT4,host=16GB", ds="auto") == 2
    assert "none of the shipped configs fits" in capsys.readouterr().out


def test_machines_that_cannot_be_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(recipe, "8xH1000-80GB") == 3
    assert 'did you mean "H100-80GB"?' in capsys.readouterr().err


def test_a_70_billion_plan_needs_little_memory(recipe: Path, tmp_path: Path) -> None:
    """In a process of its own, whose peak is measured; how long it takes is in README.md."""
    import subprocess
    import sys

    import yaml

    tree = yaml.safe_load(recipe.read_text())
    tree["model"]["config"] = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "launcher/run.py", str(tmp_path / "large.yaml"), "--plan", "--ds", "auto"]
    command += ["--cluster", "16x8xH100-80GB,host=2TB", "--run-root", str(tmp_path / "runs")]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--ds auto takes" in done.stdout
    assert int(done.stdout.splitlines()[-1]) * 1024 < 2e9
