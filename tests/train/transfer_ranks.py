"""What runs on each rank for test_transfer: cases through real DeepSpeed engines, one process group for all."""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher import recipe as recipes
from launcher.errors import LauncherError
from launcher.facts import Prepared, prepare_all
from launcher.plan import zero
from launcher.plan.plan import ModelFacts, World, make_plan
from launcher.report.record import Recorder
from tests.conftest import ROOT, free_port, join_ranks

NUM_RANKS = 2
FACTS = ModelFacts(hidden_size=32, max_positions=64)


@dataclass(frozen=True)
class Case:
    """One recipe with one of the ds configs, by the end of its name.

    Attributes:
        name: of the case; `what` names the function here that runs it.
        tree: the recipe.
        run_dir: of its exports; several cases may share one.
    """

    name: str
    what: str
    stage: int | str
    tree: dict[str, Any]
    prepared: Prepared
    run_dir: Path


def case(name: str, what: str, stage: int | str, tree: dict[str, Any], folder: Path) -> Case:
    """Prepare a case's data and first weights, once, before the ranks ask for them."""
    dumped = recipes.dump(recipes.parse(tree))
    return Case(name, what, stage, dumped, prepare_all(dumped, FACTS, str(folder / "store")), folder / name)


def run(cases: list[Case], out: Path) -> list[dict[str, Any]]:
    """Run all cases on two ranks; return what each rank found, by case."""
    torch.multiprocessing.spawn(_rank, (free_port(), cases, str(out)), nprocs=NUM_RANKS)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def _rank(rank: int, port: int, cases: list[Case], out: str) -> None:
    import torch.distributed as dist

    join_ranks(rank, NUM_RANKS, port)
    results: dict[str, Any] = {}
    for each in cases:
        try:
            results[each.name] = globals()[each.what](each, context_of(each, rank))
        except LauncherError as error:
            results[each.name] = error
        except Exception:
            raise RuntimeError(f"case {each.name}: {traceback.format_exc()}") from None
    torch.save(results, Path(out) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def context_of(case: Case, rank: int, num_ranks: int = NUM_RANKS) -> Any:
    """Return what a worker would hold."""
    name = f"zero{case.stage}.json"
    config = zero.load(str(ROOT / "ds_configs" / name))
    return context(case.tree, name, config, FACTS, case.prepared, case.run_dir, rank, num_ranks)


def context(
    tree: dict[str, Any],
    ds_name: str,
    ds_config: dict[str, Any],
    facts: ModelFacts,
    prepared: Prepared,
    run_dir: Path,
    rank: int,
    num_ranks: int = NUM_RANKS,
) -> Any:
    """Return what a worker on a CPU would hold."""
    from launcher.assembly import Context

    recipe, world = recipes.parse(tree), World(num_workers=num_ranks, device="cpu")
    return Context(
        recipe=recipe,
        plan=make_plan(recipe, ds_config, ds_name, facts, prepared.facts, world),
        prepared=prepared,
        run_dir=run_dir,
        rank=rank,
        device=torch.device("cpu"),
        recorder=Recorder(None),
        samples=None,
    )


def whole(module: Any) -> dict[str, torch.Tensor]:
    """Return copies of all parameters by name, whole; every rank must call it."""
    from launcher.train.model import gathered

    found = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def steps(built: Any, plan: Any, num_steps: int) -> Iterator[Any]:
    """Train; yield after each step what it gave."""
    from launcher.part import in_lock_step

    for step in range(1, num_steps + 1):
        yield built.engine.step(in_lock_step(built.parts, step), plan.schedule.lr(step))


def joint(case: Case, context: Any) -> dict[str, Any]:
    """The gradient of a joint step, as DeepSpeed holds it before the update."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from launcher.assembly import assemble
    from launcher.part import in_lock_step

    plan = context.plan.stages[0]
    built = assemble(context, plan)
    trainer, before = built.engine, whole(built.engine.parts)
    batches = in_lock_step(built.parts, 1)
    # A step with learning rate 0: what it tells is of the same weights as the gradient below.
    told = trainer.step(batches, 0.0)
    rounds = list(zip(*(batch.micro_batches for batch in batches), strict=True))
    sums = torch.zeros(len(batches), dtype=torch.float64)
    for i, round_ in enumerate(rounds):
        trainer.engine.set_gradient_accumulation_boundary(i == len(rounds) - 1)
        sums += trainer.backward(batches, round_)
        if i < len(rounds) - 1:
            trainer.engine.step()
    gradients = {name: safe_get_full_grad(p).detach().clone() for name, p in trainer.parts.named_parameters()}
    trainer.engine.step()
    dist.all_reduce(sums)
    found = {
        "before": before,
        "gradients": gradients,
        "sums": sums.tolist(),
        "fillers": [sum(not len(m.samples) for m in batch.micro_batches) for batch in batches],
        "losses": told.losses,
        "loss": told.loss,
        "norm": told.gradient_norm,
        "is_one_model": trainer.model(0) is trainer.model(1),
    }
    trainer.close()
    return found


def exported(case: Case, context: Any) -> dict[str, Any]:
    """As `moved`, with an export at the end."""
    return moved(case, context, is_exported=True)


def moved(case: Case, context: Any, *, is_exported: bool = False) -> dict[str, Any]:
    """Parameters before, after each step where layers open, and at the end; the optimizer's learning rates and
    memory."""
    from launcher.assembly import assemble, write_export
    from launcher.train import trainable

    plan = context.plan.stages[0]
    built = assemble(context, plan)
    trainer, module = built.engine, built.engine.model()
    snapshots, rates = [whole(module)], []
    opens = any(group.opens_after for group in trainer.groups)
    for n, _ in enumerate(steps(built, plan, plan.num_steps), start=1):
        if opens or n == plan.num_steps:
            snapshots.append(whole(module))
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    # DeepSpeed's ZeRO optimizers wrap the one that holds Adam's moments.
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    moments = [
        value.numel()
        for state in inner.state.values()
        for key, value in state.items()
        if key in ("exp_avg", "exp_avg_sq")
    ]
    found = {
        "snapshots": snapshots,
        "rates": rates,
        "groups": [(group.is_decayed, group.scale, group.opens_after) for group in trainer.groups],
        "moments": sum(moments),
        "num_trained": trainable.num_parameters(trainer.parts)[1],
        "num_tensors": sum(len(group.parameters) for group in trainer.groups),
        "base": context.start_directory(plan),
        "folder": context.stage_dir(plan.name),
    }
    if is_exported:
        write_export(context, built.parts[-1], 0, built)
        probe = built.parts[-1].probe_batch()
        found["probe"] = {name: torch.as_tensor(values) for name, values in probe.features.items()}
        found["logits"] = trainer.logits(0, probe)
    trainer.close()
    return found


def loaded(case: Case, context: Any) -> dict[str, torch.Tensor]:
    """The parameters that the last stage starts with."""
    from launcher.assembly import assemble

    built = assemble(context, context.plan.stages[-1])
    found = whole(built.engine.model())
    built.engine.close()
    return found


def language(case: Case, context: Any) -> dict[str, Any]:
    """Adapters in a causal language model without DeepSpeed: its logits, merged and alone on disk."""
    import transformers

    from launcher.train import adapters, export

    stage, base = context.recipe.stages[0], case.prepared.model_directory
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapters.add(model, stage)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # As if trained: they begin as zeros.
            parameter.data.normal_(0.0, 0.3, generator=draw)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(24).reshape(2, 12), use_cache=False).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(context.recipe.model.tokenizer)
    export.write(model, tokenizer, case.run_dir / "export", torch.float32)
    export.write_adapter(model, stage, base, case.run_dir / "adapter", torch.float32)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {"base": base, "folder": case.run_dir, "logits": logits, "trained": trained}


def checkpoints_of(context: Any, built: Any) -> Any:
    """Return the checkpoints of a stage that was assembled, one kept."""
    from launcher.train.checkpoint import Checkpoints
    from launcher.train.writer import Writer

    writer = Writer(built.engine.engine, in_background=not built.engine.is_offloaded)
    return Checkpoints(context.run_dir / "checkpoints", writer, keep=1, every_minutes=None)
