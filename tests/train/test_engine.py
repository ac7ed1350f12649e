"""The engine against a plain loop: the same losses in every ZeRO stage, precision and number of workers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher import recipe as recipes
from launcher.facts import Prepared, prepare_all
from launcher.plan import zero
from launcher.plan.plan import World, make_plan
from tests.conftest import ROOT, free_port, join_ranks

STEPS = 8
FACTS = {"hidden_size": 64, "max_positions": 256}


def _recipe(setup: dict, dtype: str) -> recipes.Recipe:
    return recipes.parse(
        {
            "model": {"config": setup["config"], "tokenizer": str(setup["tokenizer"]), "dtype": dtype},
            "stages": [
                {
                    "name": "chat",
                    "task": "causal-lm",
                    "data": {"train": str(setup["train"]), "eval": str(setup["train"])},
                    "steps": STEPS,
                    "global_batch": 10,
                    "micro_batch": 3,
                    "learning_rate": 2e-3,
                    "warmup": 2,
                    "weight_decay": 0.1,
                    "max_length": 128,
                    "seed": 3,
                }
            ],
        }
    )


def _prepared(setup: dict, recipe: recipes.Recipe) -> Prepared:
    from launcher.plan.plan import ModelFacts

    return prepare_all(recipes.dump(recipe), ModelFacts(**FACTS), str(setup["folder"] / "store"))


def _plan(recipe: recipes.Recipe, prepared: Prepared, ds: str, num_workers: int):
    from launcher.plan.plan import ModelFacts

    config = zero.load(str(ROOT / "ds_configs" / ds))
    world = World(num_workers=num_workers, device="cpu")
    return make_plan(recipe, config, ds, ModelFacts(**FACTS), prepared.facts, world).stages[0]


def _feed(recipe, prepared, plan, rank, pad):
    from launcher.data import feed
    from launcher.data.store import Store

    facts = prepared.facts[0].train
    batching = feed.Batching(
        kind=plan.kind,
        by_tokens=True,
        units_per_step=plan.units_per_step,
        micro_batch=plan.micro_batch,
        budget_tokens=plan.budget_tokens,
    )
    return feed.Feed(
        [Store(Path(path)) for path in facts.stores],
        list(facts.weights),
        batching,
        fingerprint=facts.fingerprint,
        seed=recipe.stages[0].seed,
        num_workers=plan.num_workers,
        rank=rank,
        pad_token_id=pad,
    )


def _train_rank(rank: int, num_workers: int, port: int, setup: dict, cases: list, out: str) -> None:
    """One rank: train every case through the real engine; rank 0 writes the losses."""
    import torch.distributed as dist

    from launcher import tasks
    from launcher.data import feed
    from launcher.data.split import Split
    from launcher.data.store import Store
    from launcher.tasks import base
    from launcher.train import engine, export, model, trainable
    from launcher.train.parts import Parts

    join_ranks(rank, num_workers, port)
    results = {}
    for ds, dtype in cases:
        recipe = _recipe(setup, dtype)
        prepared = _prepared(setup, recipe)
        plan = _plan(recipe, prepared, ds, num_workers)
        tokenizer = model.load_tokenizer(recipe.model)
        task = tasks.create(recipe.stages[0])
        task.columns(["messages"])
        task.set_tokenizer(tokenizer, plan.max_length)
        loaded, _ = model.load(
            recipe.model,
            prepared.model_directory,
            task.auto_model,
            options={},
            head=model.HeadStart(kind="keep", directory=None, seed=0, stage="chat"),
            dtype=dtype,
            ds=plan.ds,
        )
        groups = trainable.merged(list(trainable.groups(loaded, None, recipe.stages[0])))
        trainer = engine.Engine(
            Parts([task], [loaded], [None]),
            groups,
            plan,
            weights=[1.0],
            seed=3,
            device=torch.device("cpu"),
        )
        pad = base.padding_id(tokenizer)
        batches = _feed(recipe, prepared, plan, rank, pad)
        steps = [trainer.step((batches.step(n),), plan.schedule.lr(n)) for n in range(1, STEPS + 1)]
        # A forward without a backward, then the export: what DeepSpeed fetched ahead must not be in the way.
        split = Split([Store(Path(path)) for path in prepared.facts[0].eval.stores])
        trainer.logits(0, feed.collate(split, split.first_samples(4), pad_token_id=pad))
        export.write(
            trainer.model(), tokenizer, Path(out).parent / f"{num_workers}-{ds}-{dtype}", torch.float32
        )
        evals = feed.eval_batches(
            [Store(Path(path)) for path in prepared.facts[0].eval.stores],
            micro_batch=4,
            budget_tokens=None,
            num_workers=num_workers,
            rank=rank,
            pad_token_id=pad,
        )
        metrics = trainer.evaluate(0, evals)
        trainer.close()
        results[f"{ds} {dtype}"] = {
            "losses": [step.loss for step in steps],
            "norms": [step.gradient_norm for step in steps],
            "metrics": metrics,
        }
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def _run(num_workers: int, setup: dict, cases: list, out: Path) -> dict:
    arguments = (num_workers, free_port(), setup, cases, str(out))
    torch.multiprocessing.spawn(_train_rank, arguments, nprocs=num_workers)
    return json.loads(out.read_text())


def _plain_losses(setup: dict) -> list[float]:
    """A loop without DeepSpeed, ranks or accumulation: one forward over the whole global batch."""
    import torch.nn.functional as functional
    import transformers

    recipe = _recipe(setup, "fp32")
    prepared = _prepared(setup, recipe)
    plan = _plan(recipe, prepared, "zero0.json", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(prepared.model_directory)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    batches, losses = _feed(recipe, prepared, plan, 0, 0), []
    for step in range(1, STEPS + 1):
        parts = batches.step(step).micro_batches
        longest = max(part.features["input_ids"].shape[1] for part in parts)
        pads = {"labels": -100}
        whole = {
            name: torch.from_numpy(
                np.concatenate(
                    [
                        np.pad(
                            part.features[name],
                            ((0, 0), (0, longest - part.features[name].shape[1])),
                            constant_values=pads.get(name, 0),
                        )
                        for part in parts
                        if len(part.samples)
                    ]
                )
            )
            for name in ("input_ids", "attention_mask", "labels")
        }
        labels = whole.pop("labels")
        logits = model(**whole, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.schedule.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def runs(chat_setup: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("engine")
    for dtype in ("fp32",):
        _prepared(chat_setup, _recipe(chat_setup, dtype))
    cases = [(f"zero{stage}.json", dtype) for stage in range(4) for dtype in ("fp32", "bf16")]
    return {
        2: _run(2, chat_setup, cases, folder / "two.json"),
        1: _run(1, chat_setup, [("zero3.json", "fp32")], folder / "one.json"),
        "plain": _plain_losses(chat_setup),
    }


def _largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stage", range(4))
def test_fp32_losses_follow_a_plain_loop(runs: dict, stage: int) -> None:
    difference = _largest(runs[2][f"zero{stage}.json fp32"]["losses"], runs["plain"])
    print(f"ZeRO-{stage} against a plain loop, fp32: {difference:.2g}")
    assert difference < 2e-5


@pytest.mark.parametrize("stage", range(4))
def test_bf16_losses_follow_a_plain_loop_to_rounding(runs: dict, stage: int) -> None:
    difference = _largest(runs[2][f"zero{stage}.json bf16"]["losses"], runs["plain"])
    print(f"ZeRO-{stage} against a plain loop, bf16: {difference:.2g}")
    assert difference < 2e-2


def test_one_worker_and_two_agree(runs: dict) -> None:
    one, two = runs[1]["zero3.json fp32"], runs[2]["zero3.json fp32"]
    assert _largest(one["losses"], two["losses"]) < 2e-5
    assert _largest(one["norms"], two["norms"]) < 2e-4
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4)


def test_gradient_norms_are_the_same_in_every_stage(runs: dict) -> None:
    for stage in range(3):
        norms = runs[2][f"zero{stage}.json fp32"]["norms"]
        assert _largest(norms, runs[2]["zero3.json fp32"]["norms"]) < 1e-4


def test_the_loss_falls(runs: dict) -> None:
    losses = runs[2]["zero3.json fp32"]["losses"]
    assert losses[-1] < losses[0] - 0.1
