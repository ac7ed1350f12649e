"""Which evaluation counts as the best, and when training stops: tables, and the loop with a judge in it."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from launcher import recipe as recipes
from launcher.errors import RecipeError
from launcher.judge import Verdict, is_better_high, judge
from launcher.plan.schedule import Schedule
from launcher.tasks import create
from launcher.train import loop
from launcher.train.step import NO_WISHES, Wishes

NAN = math.nan


def stage(select: Any, **data: Any) -> recipes.Stage:
    return recipes.Stage.model_validate(
        {
            "name": "target",
            "task": "text-classification",
            "data": {"train": "t.csv", "eval": "e.csv", **data},
            "select": select,
        }
    )


def verdicts(asked: recipes.Stage, metric: str, values: list[float]) -> list[Verdict]:
    before, result = Verdict(), []
    for value in values:
        before = judge(asked, before, {metric: value}, task=create(asked))
        result.append(before)
    return result


@pytest.mark.parametrize(
    ("metric", "values", "is_best", "best"),
    [
        ("accuracy", [0.5, 0.7, 0.6, 0.8], [1, 1, 0, 1], 0.8),
        ("accuracy", [0.5, 0.5], [1, 0], 0.5),  # As good is not better: the earlier one is kept.
        ("accuracy", [0.0, 0.1], [1, 1], 0.1),
        ("loss", [0.5, 0.7, 0.4, 0.4], [1, 0, 1, 0], 0.4),
        ("accuracy", [0.5, NAN, 0.6], [1, 0, 1], 0.6),
        ("loss", [NAN, 0.6, NAN, 0.7], [0, 1, 0, 0], 0.6),
        ("loss", [math.inf, 3.0], [1, 1], 3.0),
    ],
)
def test_the_best_value(metric: str, values: list[float], is_best: list[int], best: float) -> None:
    told = verdicts(stage({"metric": metric}), metric, values)
    assert [verdict.is_best for verdict in told] == [bool(each) for each in is_best]
    assert told[-1].best == best
    assert not any(verdict.is_enough for verdict in told)


def test_nothing_but_nan_is_never_the_best() -> None:
    told = verdicts(stage({"metric": "accuracy", "patience": 2}), "accuracy", [NAN, NAN])
    assert [(v.best, v.is_best, v.is_enough) for v in told] == [(None, False, False), (None, False, True)]


@pytest.mark.parametrize(
    ("patience", "values", "is_enough"),
    [
        (1, [0.5, 0.4], [0, 1]),
        (2, [0.5, 0.4, 0.6, 0.5, 0.5], [0, 0, 0, 0, 1]),  # A better one begins the count anew.
        (2, [0.5, NAN, 0.5], [0, 0, 1]),
        (None, [0.5] + [0.1] * 50, [0] * 51),
    ],
)
def test_patience(patience: int | None, values: list[float], is_enough: list[int]) -> None:
    told = verdicts(stage({"metric": "accuracy", "patience": patience}), "accuracy", values)
    assert [verdict.is_enough for verdict in told] == [bool(each) for each in is_enough]


def test_auto_is_the_metric_of_the_task_and_its_way() -> None:
    asked = stage("auto")
    told = judge(asked, Verdict(best=0.5), {"loss": 0.1, "accuracy": 0.4}, task=create(asked))
    assert (told.best, told.num_since) == (0.5, 1)
    number = stage("auto", label_type="number")
    task = create(number)
    told = judge(number, Verdict(best=0.5), {task.metric: 0.6, "mse": 9.0}, task=task)
    assert told.is_best == task.is_better_high


@dataclass
class LowIsGood:
    """As a task whose own metric is an error rate."""

    metric: str = "error"
    is_better_high: bool = False


@pytest.mark.parametrize(
    ("metric", "is_high"),
    [("error", False), ("loss", False), ("perplexity", False), ("mse", False), ("mae", False), ("f1", True)],
)
def test_which_way_is_better(metric: str, is_high: bool) -> None:
    assert is_better_high(metric, LowIsGood()) is is_high


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as error:
        verdicts(stage("acuracy"), "accuracy", [0.5])
    message = str(error.value)
    assert message.startswith("stages.target.select.metric") and "\n" not in message
    assert 'did you mean "accuracy"?' in message and "it has: accuracy" in message


def test_a_verdict_survives_a_checkpoint() -> None:
    told = verdicts(stage({"metric": "loss", "patience": 3}), "loss", [0.5, 0.6])[-1]
    assert Verdict(**told.state()) == told
    assert told.state() == {"best": 0.5, "num_since": 1, "is_best": False, "is_enough": False}


@dataclass
class Result:
    wishes: Wishes = NO_WISHES


@dataclass
class Counter:
    """A trainer that only counts."""

    made: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)

    def step(self, batch: int, lr: float, wishes: Wishes) -> Result:
        self.made.append(batch)
        self.wanted.append(wishes.save)
        return Result(wishes)


def train(
    values: list[float], select: Any, *, start: int = 0, save_every: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Run the loop for ten steps with an evaluation every other; return the steps made, judged and saved."""
    asked, trainer = stage(select), Counter()
    state, judged, saved = Verdict(), [], []
    collected: list[int] = []

    def evaluate(step: int) -> bool:
        nonlocal state
        judged.append(step)
        state = judge(asked, state, {"accuracy": values[len(judged) - 1]}, task=create(asked))
        return state.is_enough

    loop.run(
        start=start,
        schedule=Schedule(
            num_steps=10,
            warmup_steps=0,
            learning_rate=1.0,
            kind="constant",
            eval_every=2,
            save_every=save_every,
        ),
        batch_of=lambda step: step,
        engine=trainer,
        wishes=Wishes,
        record=lambda batch, result: None,
        evaluate=evaluate,
        save=saved.append,
        leave=lambda step: None,
        collect=collected.append,
    )
    assert collected == trainer.made
    return trainer.made, judged, saved


def test_training_stops_and_saves_when_it_is_enough() -> None:
    made, judged, saved = train([0.5, 0.6, 0.5, 0.6, 0.7], {"metric": "auto", "patience": 2})
    assert made == [1, 2, 3, 4, 5, 6, 7, 8]
    assert judged == [2, 4, 6, 8]
    assert saved == [8]


def test_training_that_gets_better_goes_on_to_the_end() -> None:
    made, judged, saved = train([0.5, 0.4, 0.6, 0.5, 0.7], {"metric": "auto", "patience": 2}, save_every=5)
    assert made == list(range(1, 11))
    assert judged == [2, 4, 6, 8, 10]
    assert saved == [5, 10]


def test_enough_at_a_step_that_is_saved_anyway_saves_once() -> None:
    made, _, saved = train([0.5, 0.4], {"metric": "auto", "patience": 1}, save_every=2)
    assert made == [1, 2, 3, 4] and saved == [2, 4]


def test_without_select_nothing_stops_early_and_a_restart_goes_on_where_it_was() -> None:
    made, judged, saved = train([0.1] * 5, "auto", start=5)
    assert made == [6, 7, 8, 9, 10] and judged == [6, 8, 10] and saved == [10]
