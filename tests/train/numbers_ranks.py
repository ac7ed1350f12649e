"""What runs on each rank for test_numbers: bad batches through real DeepSpeed engines."""

from typing import Any

import torch

from launcher.errors import NumbersError
from launcher.train.step import Wishes
from tests.conftest import free_port, join_ranks
from tests.train.transfer_ranks import NUM_RANKS, Case, context_of, whole


def run(cases: list[Case], out: Any) -> list[dict[str, Any]]:
    """Run all cases on two ranks; return what each rank found, by case."""
    torch.multiprocessing.spawn(_rank, (free_port(), cases, str(out)), nprocs=NUM_RANKS)
    return [torch.load(f"{out}/rank-{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def _rank(rank: int, port: int, cases: list[Case], out: str) -> None:
    join_ranks(rank, NUM_RANKS, port)
    found = {case.name: _case(case, rank) for case in cases}
    torch.save(found, f"{out}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def _case(case: Case, rank: int) -> dict[str, Any]:
    """Once with the bad batch skipped as it comes, once without it from the start, once to its error."""
    skipping = _trained(case, rank, "skip", frozenset())
    bad = [step for step, fault in enumerate(skipping["faults"], start=1) if fault]
    return {
        "skipping": skipping,
        "without": _trained(case, rank, "skip", frozenset(bad)),
        "stopping": _trained(case, rank, "stop", frozenset()),
    }


def _trained(case: Case, rank: int, on_nan: Any, passed: frozenset[int]) -> dict[str, Any]:
    from launcher.assembly import assemble
    from launcher.part import in_lock_step
    from launcher.train.numbers import Guard
    from launcher.train.shards import Shards

    context = context_of(case, rank)
    plan, told = context.plan.stages[0], []
    built = assemble(context, plan)
    guard = Guard(
        built.engine,
        stage=plan.name,
        names=[part.name for part in built.parts],
        on_nan=on_nan,
        spike=context.recipe.spike,
        passed=passed,
        write=told.append,
        before_error=lambda step: None,
    )
    if context.recipe.spike is not None:
        # What a checkpoint of a longer run would bring.
        guard.rule.losses.extend([0.2, 0.6] * 10)
    shards = Shards(built.engine.engine)
    found: dict[str, Any] = {"faults": [], "losses": [], "norms": [], "changed": [], "told": told}
    found["optimizer"] = type(built.engine.engine.optimizer).__name__
    for step in range(1, plan.num_steps + 1):
        before = _state(shards)
        try:
            result = guard.step(
                in_lock_step(built.parts, step), plan.schedule.lr(step), Wishes(save=rank == 1)
            )
        except NumbersError as error:
            found |= {"error": error, "changed_by_error": _differs(before, _state(shards))}
            break
        assert result.wishes == Wishes(save=True)
        found["faults"].append(result.fault)
        found["losses"].append(result.loss)
        found["norms"].append(result.gradient_norm)
        found["changed"].append(_differs(before, _state(shards)))
    found["weights"] = whole(built.engine.parts)
    built.engine.close()
    return found


def _state(shards: Any) -> list[torch.Tensor]:
    tensors = [each.clone() for flat in shards.flats for each in shards.tensors(flat).values()]
    return [*tensors, torch.tensor(sorted(shards.scalars().values()))]


def _differs(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
