"""Checkpoints through real DeepSpeed engines: any number of ranks, any ZeRO stage, damage, and what is planted."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import recipe as recipes
from launcher.facts import Prepared, prepare_all
from launcher.plan.plan import ModelFacts
from launcher.train import shard_file
from tests.conftest import sentence, write_jsonl
from tests.train import checkpoint_ranks as ranks

pytestmark = pytest.mark.timeout(900)
FACTS = ModelFacts(hidden_size=64, max_positions=256)
STEPS = 8
# (ranks, ds config, to which step): a run that is moved about.
CHAIN = ((2, "zero2", 2), (1, "zero3", 4), (3, "zero3", 6), (2, "zero1", 7), (2, "zero0", 8))


def trees(setup: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A language model, and a classifier with a head of its own whose layers open one after another."""
    import random

    draw = random.Random(1)
    rows = [{"text": sentence(draw, draw.randint(2, 9)), "label": "ab"[i % 2]} for i in range(90)]
    labelled = write_jsonl(setup["folder"] / "labelled.jsonl", rows)
    common = {
        "steps": STEPS,
        "global_batch": 6,
        "micro_batch": 2,
        "learning_rate": 1e-3,
        "max_length": 256,
        "name": "only",
    }
    bert = {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    chat = {"task": "causal-lm", "data": {"train": str(setup["train"])}} | common
    label = {"task": "text-classification", "data": {"train": str(labelled)}} | common
    gradual = {"trainable": {"unfreeze_every": 2, "layer_decay": 0.5}}
    tokenizer = {"tokenizer": str(setup["tokenizer"])}
    return {
        "chat": {"model": {"config": setup["config"], "dtype": "fp32"} | tokenizer, "stages": [chat]},
        "bf16": {"model": {"config": setup["config"], "dtype": "bf16"} | tokenizer, "stages": [chat]},
        "label": {"model": {"config": bert, "dtype": "fp32"} | tokenizer, "stages": [label | gradual]},
    }


@pytest.fixture(scope="module")
def asked(chat_setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for name, tree in trees(chat_setup).items():
        dumped = recipes.dump(recipes.parse(tree))
        found[name] = (dumped, prepare_all(dumped, FACTS, str(folder / "store")))
    return {"folder": folder, "trees": found}


def leg(asked: dict[str, Any], task: str, run: str, num_ranks: int, ds: str, last: int) -> ranks.Leg:
    tree, prepared = asked["trees"][task]
    assert isinstance(prepared, Prepared)
    return ranks.Leg(run, num_ranks, ds, last, tree, prepared, FACTS, asked["folder"])


@pytest.fixture(scope="module")
def undisturbed(asked: dict[str, Any]) -> dict[str, Any]:
    """Each task from the first step to the last by two ranks under ZeRO-2."""
    tasks = ("chat", "label", "bf16")
    return dict(
        zip(tasks, ranks.run([leg(asked, t, f"whole-{t}", 2, "zero2", STEPS) for t in tasks]), strict=True)
    )


@pytest.fixture(scope="module")
def moved(asked: dict[str, Any]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The same in legs, each by another number of ranks or in another ZeRO stage."""
    found: dict[str, list[dict[str, Any]]] = {"chat": [], "label": [], "bf16": []}
    for num_ranks, ds, last in CHAIN:
        # Without ZeRO DeepSpeed makes a step with bf16 before the first one.
        tasks = [task for task in found if not (task == "bf16" and ds == "zero0")]
        legs = [leg(asked, task, f"moved-{task}", num_ranks, ds, last) for task in tasks]
        for task, told in zip(tasks, ranks.run(legs), strict=True):
            found[task].append(told)
    yield found


@pytest.mark.parametrize(("task", "limit"), [("chat", 1e-5), ("label", 1e-5), ("bf16", 5e-3)])
def test_a_run_goes_on_with_other_ranks_and_in_other_stages(
    undisturbed: dict[str, Any], moved: dict[str, Any], task: str, limit: float
) -> None:
    legs = moved[task]
    assert [each["start"] for each in legs] == [0, 2, 4, 6, 7][: len(legs)]
    losses = [loss for each in legs for loss in each["losses"]]
    wanted = undisturbed[task]["losses"][: len(losses)]
    largest = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    print(f"{task}: largest relative difference of losses {largest:.1e}")
    assert largest < limit
    samples = [step for each in legs for step in each["samples"]]
    assert samples == undisturbed[task]["samples"][: len(samples)]


def test_the_last_two_are_kept_and_each_tells_what_it_cost(
    asked: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    kept = sorted(path.name for path in (asked["folder"] / "whole-chat" / "checkpoints").iterdir())
    assert kept == ["step-00000007", "step-00000008"]
    saves = undisturbed["chat"]["saves"]
    assert [each["step"] for each in saves] == list(range(1, STEPS + 1))
    assert all(0 < each["stall_s"] <= each["save_s"] and each["bytes"] > 0 for each in saves)


@pytest.fixture(scope="module")
def damaged(asked: dict[str, Any], undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Runs like the whole one, each with something wrong in its newest checkpoint, or in both."""
    folder: Path = asked["folder"]
    names = ("same", "flipped", "truncated", "unfinished", "both", "planted")
    for name in names:
        shutil.copytree(folder / "whole-chat", folder / name)
    flip(newest(folder, "flipped"))
    cut(newest(folder, "truncated"))
    (newest(folder, "unfinished").parent / "commit.json").unlink()
    flip(newest(folder, "both"))
    flip(newest(folder, "both", 7))
    plant(newest(folder, "planted"), folder / "marker")
    legs = [leg(asked, "chat", name, 2, "zero2", STEPS) for name in names]
    return dict(zip(names, ranks.run(legs), strict=True))


def newest(folder: Path, name: str, step: int = STEPS) -> Path:
    return folder / name / "checkpoints" / f"step-{step:08d}" / "rank-00001.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def plant(path: Path, marker: Path) -> None:
    """Put pickles where DeepSpeed would look for them and in the place of a file, with a record that fits."""
    (path.parent / "mp_rank_00_model_states.pt").write_bytes(ranks.bomb(marker))
    (path.parent / "latest").write_bytes(ranks.bomb(marker))
    path.write_bytes(ranks.bomb(marker))
    record = json.loads((path.parent / "commit.json").read_text())
    record["files"][path.name] = {"bytes": path.stat().st_size, "digest": shard_file.digest_of(path)}
    (path.parent / "commit.json").write_text(json.dumps(record))


def test_a_whole_one_is_restored_to_the_end(damaged: dict[str, Any]) -> None:
    assert damaged["same"] == {"start": STEPS, "losses": [], "samples": [], "saves": []}


@pytest.mark.parametrize("name", ["flipped", "truncated", "unfinished"])
def test_a_damaged_one_is_passed_over_for_the_one_before(
    damaged: dict[str, Any], undisturbed: dict[str, Any], name: str
) -> None:
    assert damaged[name]["start"] == STEPS - 1
    # Bit for bit: the same ranks, the same stage, fp32.
    assert damaged[name]["losses"] == undisturbed["chat"]["losses"][-1:]


def test_when_all_are_damaged_the_run_does_not_begin_anew_by_itself(damaged: dict[str, Any]) -> None:
    assert "nor is there another whole checkpoint" in damaged["both"]["error"]


def test_a_planted_pickle_is_not_run(asked: dict[str, Any], damaged: dict[str, Any]) -> None:
    assert "is no file of a checkpoint" in damaged["planted"]["error"]
    assert not (asked["folder"] / "marker").exists()
    # The bomb does go off where it is read as a pickle.
    import pickle

    pickle.loads(ranks.bomb(asked["folder"] / "marker"))
    assert (asked["folder"] / "marker").exists()
