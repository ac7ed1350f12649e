"""Long samples on two CPU ranks: pieces and tiles against whole samples, by real DeepSpeed engines."""

import json
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher import recipe as recipes
from launcher.assembly import Assembly, Context, assemble, write_export
from launcher.errors import ModelError
from launcher.facts import Prepared, prepare_all
from launcher.part import in_lock_step
from launcher.plan import zero
from launcher.plan.plan import ModelFacts, StagePlan
from launcher.tasks import next_tokens
from tests.conftest import ROOT, free_port, join_ranks
from tests.train import transfer_ranks as ranks

pytestmark = pytest.mark.timeout(900)
NUM_RANKS, STEPS, TILE_BYTES = 2, 4, 2**14
FACTS = ModelFacts(hidden_size=64, max_positions=256, num_heads=4, num_kv_heads=2)


@dataclass(frozen=True)
class Case:
    """One way to train the same thing.

    Attributes:
        same_as: the case whose losses and weights it must have; None: it is one of those.
        ds: the ds config.
        team: its sequence_parallel_size.
        tile: tokens of a tile of the feed-forward networks; None: they run whole.
        stage, model: changes of the recipe's, and of its model's config.
        loss_in_tiles: whether the loss is.
    """

    same_as: str | None
    ds: str
    team: int = 2
    tile: int | None = None
    loss_in_tiles: bool = False
    stage: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()


PACKED = (("batching", "packed"), ("max_length", 256), ("global_batch", 2))
RECOMPUTED = (("activation_checkpointing", True),)
ROWS = (("micro_batch", 3),)
ONE_KV_HEAD = (("num_key_value_heads", 1),)
WINDOWS = (("model_type", "mistral"), ("sliding_window", 16))
TIED = (("tie_word_embeddings", True),)
CASES = {
    "plain": Case(None, "zero0", 1),
    "zero0": Case("plain", "zero0"),
    "zero1": Case("plain", "zero1", stage=ROWS),
    "zero2": Case("plain", "zero2"),
    "zero3": Case("plain", "zero3", stage=ROWS),
    "long": Case("plain", "zero3_long_context"),
    "all": Case("plain", "zero3_long_context", tile=24, loss_in_tiles=True, stage=RECOMPUTED),
    "zero2-tiles": Case("plain", "zero2", 1, tile=24, loss_in_tiles=True, stage=RECOMPUTED),
    "zero3-tiles": Case("plain", "zero3", 1, tile=24, loss_in_tiles=True),
    "packed": Case(None, "zero0", 1, stage=PACKED),
    "packed-long": Case("packed", "zero3", stage=PACKED),
    "one-kv-head": Case(None, "zero0", 1, model=ONE_KV_HEAD),
    "one-kv-head-long": Case("one-kv-head", "zero2", model=ONE_KV_HEAD),
    "windows": Case(None, "zero0", 1, model=WINDOWS),
    "windows-long": Case("windows", "zero2", model=WINDOWS),
    "tied": Case(None, "zero0", 1, model=TIED),
    "tied-long": Case("tied", "zero3", loss_in_tiles=True, model=TIED),
}
SAME = [name for name, case in CASES.items() if case.same_as is not None]


def tree(setup: dict[str, Any], case: Case) -> dict[str, Any]:
    return {
        "model": {
            "config": setup["config"] | dict(case.model),
            "tokenizer": str(setup["tokenizer"]),
            "dtype": "fp32",
        },
        "stages": [
            {
                "name": "chat",
                "task": "causal-lm",
                "data": {"train": str(setup["train"]), "eval": str(setup["eval"])},
                "steps": STEPS,
                "global_batch": 6,
                "micro_batch": 1,
                "learning_rate": 1e-3,
                "warmup": 0,
                "max_length": 255,
                "seed": 3,
            }
            | dict(case.stage)
        ],
    }


def built_for(context: Context, plan: StagePlan, case: Case) -> Assembly:
    built = assemble(context, plan)
    if case.loss_in_tiles:
        for task in built.engine.parts.tasks:
            task.tiles = next_tokens.Tiles(TILE_BYTES)
    return built


def step(built: Assembly, plan: StagePlan, number: int) -> Any:
    return built.engine.step(in_lock_step(built.parts, number), plan.schedule.lr(number))


def trained(context: Context, case: Case) -> dict[str, Any]:
    """Train with a checkpoint after the first step, evaluate, export; then go on from the checkpoint."""
    plan = replace(context.plan.stages[0], mlp_tile=case.tile)
    if case.tile is not None:
        plan = replace(plan, recomputes=True)
    built = built_for(context, plan, case)
    if plan.kind == "packed":
        built.engine.prove_packing(built.parts[-1].batches.step(1).micro_batches[0])
    checkpoints = ranks.checkpoints_of(context, built)
    results = [step(built, plan, 1)]
    checkpoints.save(1, {"fingerprint": "x", "position": 1})
    results += [step(built, plan, number) for number in range(2, STEPS + 1)]
    metrics = built.engine.evaluate(0, built.parts[0].eval_batches())
    write_export(context, built.parts[-1], 0, built)
    probe = built.parts[-1].probe_batch()
    found = {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "metrics": metrics,
        "logits": built.engine.logits(0, probe).tolist(),
        "mask": probe.features["attention_mask"].tolist(),
        "team": plan.team,
    }
    checkpoints.wait()
    built.engine.close()
    built = built_for(context, plan, case)
    start = ranks.checkpoints_of(context, built).restore(fingerprint="x")
    found["resumed"] = [step(built, plan, number).loss for number in range(start + 1, STEPS + 1)]
    built.engine.close()
    return found


def bypassed(context: Context) -> str:
    """What is said of a model whose attention has a table of its own, as some have in transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, sdpa_attention_forward

    built = assemble(context, context.plan.stages[0])
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
    said = ""
    try:
        step(built, context.plan.stages[0], 1)
    except ModelError as error:
        said = str(error)
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    built.engine.close()
    return said if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward else "not put back"


def config_of(case: Case) -> dict[str, Any]:
    return zero.load(str(ROOT / f"ds_configs/{case.ds}.json")) | {"sequence_parallel_size": case.team}


def _rank(rank: int, port: int, folder: str, jobs: dict[str, tuple[dict[str, Any], Prepared]]) -> None:
    import torch.distributed as dist

    join_ranks(rank, NUM_RANKS, port)
    results: dict[str, Any] = {}
    for name, (asked, prepared) in jobs.items():
        case = CASES[name]
        try:
            context = ranks.context(asked, name, config_of(case), FACTS, prepared, Path(folder) / name, rank)
            results[name] = trained(context, case)
        except Exception:
            raise RuntimeError(f"{name}: {traceback.format_exc()}") from None
    asked, prepared = jobs["zero0"]
    context = ranks.context(
        asked, "own", config_of(CASES["zero0"]), FACTS, prepared, Path(folder) / "own", rank
    )
    results["own attention"] = {"said": bypassed(context)}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(chat_setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases in one start of two processes."""
    folder = tmp_path_factory.mktemp("long")
    lines = chat_setup["train"].read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(lines[:7]))
    setup, jobs = chat_setup | {"eval": folder / "eval.jsonl"}, {}
    for name, case in CASES.items():
        asked = recipes.dump(recipes.parse(tree(setup, case)))
        jobs[name] = asked, prepare_all(asked, FACTS, str(folder / "store"))
    torch.multiprocessing.spawn(_rank, (free_port(), str(folder), jobs), nprocs=NUM_RANKS)
    found = json.loads((folder / "rank-0.json").read_text())
    for name in CASES:
        found[name]["weights"] = load_file(folder / name / "stages/chat/export/model.safetensors")
    return found


@pytest.fixture(params=SAME)
def pair(request: pytest.FixtureRequest, runs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a case gave, and what it should have."""
    return runs[request.param], runs[CASES[request.param].same_as or ""]


@pytest.mark.slow
def test_losses_norms_and_export_are_those_of_whole_samples(
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found, wanted = pair
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=1e-4), name


@pytest.mark.slow
def test_evaluation_and_logits_are_those_of_whole_samples(
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found, wanted = pair
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4)
    seen = torch.tensor(wanted["mask"]).bool()
    mine, whole = (torch.tensor(each["logits"])[seen] for each in (found, wanted))
    assert torch.allclose(mine, whole, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.team > 1])
def test_a_new_engine_goes_on_from_the_checkpoint(name: str, runs: dict[str, Any]) -> None:
    assert runs[name]["team"] == 2
    assert runs[name]["resumed"] == runs[name]["losses"][1:]


@pytest.mark.slow
def test_a_model_that_attends_by_itself_is_refused_at_its_first_step(runs: dict[str, Any]) -> None:
    assert runs["own attention"]["said"].startswith(
        "LlamaForCausalLM does its attention by itself in 2 of 2 layers, so samples cannot be divided:"
    )
