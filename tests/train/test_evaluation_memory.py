"""What evaluation holds at once does not depend on how much is evaluated."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from launcher.train.trace import Live
from tests.conftest import join_ranks
from tests.train import test_same_on_any_ranks as same
from tests.train import transfer_ranks as ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_TIMES = 20
NUM_ROWS = {"tags": 3, "translation": 2}
# Of each row as many as fill micro-batches: however many there are, they are of the same shapes.
NUM_COPIES = 6


def _rank(rank: int, num_ranks: int, port: int, pairs: list[tuple[ranks.Case, ranks.Case]], out: str) -> None:
    join_ranks(rank, num_ranks, port)
    torch.save({few.name: peaks(few, many) for few, many in pairs}, out)
    torch.distributed.destroy_process_group()


def peaks(few: ranks.Case, many: ranks.Case) -> list[dict[str, int]]:
    """Evaluate a few batches and many by one engine; return the peaks of each."""
    from launcher.assembly import assemble
    from launcher.part import Part

    context = ranks.context_of(few, 0, 1)
    built = assemble(context, context.plan.stages[0])
    small = built.parts[0]
    facts = replace(small.facts, eval=many.prepared.facts[0].eval)
    large = Part(small.asked, small.plan, facts, built.tokenizer, small.seat)
    # What is made once and kept, like the metrics' own tables, is made before anything is measured.
    built.engine.evaluate(0, small.eval_batches())
    found = [peak(built.engine, part) for part in (small, large)]
    built.engine.close()
    return found


def peak(engine: Any, part: Any) -> dict[str, int]:
    """Evaluate; return the number of batches, and the peak of all tensors in bytes."""
    num_batches = sum(1 for _ in part.eval_batches())
    with Live([]) as live:
        engine.evaluate(0, part.eval_batches())
    # Without a backward there are no gradients: the curve is its highest point.
    ((most, _),) = live.curve()
    return {"batches": num_batches, "bytes": most}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("memory")
    few = same.cases(folder, NUM_ROWS, NUM_COPIES)
    many = same.cases(folder / "many", NUM_ROWS, NUM_COPIES * NUM_TIMES)
    pairs = [(each, many[name]) for name, each in few.items()]
    out = folder / "found.pt"
    same.start(_rank, 1, pairs, str(out))
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("name", NUM_ROWS)
def test_the_peak_is_flat_in_the_size_of_the_eval_set(found: dict, name: str) -> None:
    few, many = found[name]
    print(name, few, many)
    assert many["batches"] == NUM_TIMES * few["batches"]
    # The logits of one more batch would be more than that.
    assert many["bytes"] < 1.02 * few["bytes"]
