"""The calendar of a stage as a table, and the learning rate against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from launcher.plan.schedule import Schedule


def _schedule(kind: str = "linear", **changes: object) -> Schedule:
    values = {"num_steps": 20, "warmup_steps": 5, "learning_rate": 0.1, "eval_every": 8, "save_every": None}
    return Schedule(kind=kind, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rate_is_transformers(kind: str, warmup: int) -> None:
    schedule = _schedule(kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(1, 21):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_what_is_due() -> None:
    schedule = _schedule(save_every=10)
    assert [step for step in range(1, 21) if schedule.eval_due(step)] == [8, 16, 20]
    assert [step for step in range(1, 21) if schedule.save_due(step)] == [10, 20]
    assert schedule.save_due(3, wanted=True)
    assert [step for step in range(1, 21) if _schedule(eval_every=None).eval_due(step)] == [20]
