"""Long samples on two CPU ranks: pieces and tiles against whole samples, by real DeepSpeed engines."""

import json
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher import footprint
from launcher import recipe as recipes
from launcher.assembly import Assembly, Context, assemble, write_export
from launcher.errors import ModelError
from launcher.facts import Prepared, prepare_all
from launcher.part import in_lock_step
from launcher.plan import zero
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts, StagePlan, World, make_plan
from launcher.plan.shapes import Shapes
from launcher.tasks import next_tokens
from launcher.train import recompute, sequence
from tests.conftest import ROOT, free_port, join_ranks
from tests.tasks.test_next_tokens import SHAPE, batch_of, model_of, peak_of
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
    from launcher.train.checkpoint import Checkpoints

    plan = replace(context.plan.stages[0], mlp_tile=case.tile)
    if case.tile is not None:
        plan = replace(plan, recomputes=True)
    built = built_for(context, plan, case)
    if plan.kind == "packed":
        built.engine.prove_packing(built.parts[-1].batches.step(1).micro_batches[0])
    checkpoints = Checkpoints(context.run_dir / "checkpoints", keep=1, every_minutes=None)
    results = [step(built, plan, 1)]
    checkpoints.save(built.engine.engine, 1, {"fingerprint": "x", "position": 1})
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
    built.engine.close()
    built = built_for(context, plan, case)
    start = checkpoints.restore(built.engine.engine, fingerprint="x")
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


@pytest.mark.parametrize(
    ("keys", "attention", "size", "says"),
    [
        ({}, "sdpa", 4, "the model has 2 attention heads, which 4 does not divide"),
        ({}, "eager", 2, "its attention (eager) is in its own code"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "sdpa",
            2,
            "its positions are scaled by the length of a sample (dynamic)",
        ),
    ],
)
def test_models_that_cannot_be_divided_are_refused(
    keys: dict[str, Any], attention: str, size: int, says: str
) -> None:
    model = model_of(**keys)
    model.set_attn_implementation(attention)
    with pytest.raises(ModelError) as refused:
        sequence.check(model, size)
    assert str(refused.value) == (
        f"LlamaForCausalLM: samples cannot be divided among {size} workers, since {says}: leave"
        " sequence_parallel_size out of the ds config"
    )


@pytest.mark.parametrize("tokens", [5, 17, 100])
def test_networks_in_tiles_give_the_same_gradients(tokens: int) -> None:
    batch, found = batch_of(), []
    for is_tiled in (False, True):
        model = model_of()
        if is_tiled:
            recompute.tile(model, tokens)
            assert len(list(recompute.tiled(model))) == 2
        model(**batch).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-7), name


def test_networks_in_tiles_hold_less() -> None:
    batch, peaks = batch_of(rows=1, length=1024), []
    for tokens in (None, 64):
        model = model_of(intermediate_size=2000)
        recompute.turn_on(model)
        if tokens is not None:
            recompute.tile(model, tokens)
        peaks.append(peak_of(lambda model=model: model(**batch).loss.backward()))
    whole = 4 * 1024 * 2000
    print(
        f"peak {peaks[0] / 1e6:.1f} MB, in tiles {peaks[1] / 1e6:.1f} MB; one tensor of a network {whole / 1e6:.1f}"
    )
    assert peaks[1] < peaks[0] - 3 * whole


def shapes_of(team: int, length: int = 4096, vocabulary: int = 1000, **keys: Any) -> Shapes:
    """What is forecast of a stage on two workers."""
    config = (
        SHAPE | {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 10**6} | keys
    )
    stage = {
        "name": "s",
        "task": "causal-lm",
        "data": {"train": "x"},
        "max_length": length,
        "micro_batch": 1,
        "activation_checkpointing": True,
    }
    asked = recipes.parse({"model": {"config": config, "tokenizer": "x"}, "stages": [stage]})
    facts = (StageFacts(train=SplitFacts(about_rows=9, num_samples=9, is_settled=True), eval=None),)
    ds = {"sequence_parallel_size": team}
    plan = make_plan(asked, ds, "ds", ModelFacts(), facts, World(num_workers=2, device="cuda"))
    return footprint.of_stage(asked, plan.stages[0], facts, dtype="bf16", device="cuda")


def test_the_forecast_follows_pieces_and_tiles() -> None:
    whole, half = shapes_of(1), shapes_of(2)
    assert (whole.plain.length, half.plain.length) == (4096, 2048)
    assert half.plain.held == pytest.approx(whole.plain.held / 2, rel=0.3)
    assert half.plain.flops == pytest.approx(whole.plain.flops / 2, rel=0.01)
    # 4,096 tokens of 100,000 words: 1.6 GB of logits in fp32, and never whole.
    assert shapes_of(1, vocabulary=100_000).plain.peak(0) < 4 * 4096 * 100_000 / 2
    # Below and above the tokens that a feed-forward network takes at once: its tensors stay as large as a tile.
    lengths = (32_000, 33_000)
    wide = [shapes_of(1, each, intermediate_size=4000).checkpointed for each in lengths]
    assert wide[0] is not None and wide[1] is not None
    assert wide[1].peak(0) < wide[0].peak(0) / 2


def test_what_the_config_forbids_is_refused_before_there_are_workers() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ModelError, match="samples cannot be divided among 2 workers"):
        shapes_of(2, rope_parameters=rope)
