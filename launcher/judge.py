"""Which evaluation was the best so far, and whether to go on: pure, and part of a checkpoint's state."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import RecipeError, nearest
from launcher.recipe import Stage


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known after an evaluation.

    Attributes:
        best: the best value so far.
        num_since: evaluations since then.
        is_best: whether this one is the best.
        is_enough: whether to stop.
    """

    best: float | None = None
    num_since: int = 0
    is_best: bool = False
    is_enough: bool = False

    def state(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def judge(stage: Stage, before: Verdict, metrics: dict[str, float], *, task: Any) -> Verdict:
    """Judge an evaluation.

    Args:
        stage: with `select`.
        before: what was known before.
        metrics: of this evaluation.
        task: says which metric counts by default, and which way is better.

    Raises:
        RecipeError: there is no such metric.
    """
    assert stage.select is not None
    name = task.metric if stage.select.metric == "auto" else stage.select.metric
    if name not in metrics:
        raise RecipeError(
            f'stages.{stage.name}.select.metric: {stage.task} has no metric "{name}"{nearest(name, metrics)};'
            f" it has: {', '.join(metrics)}"
        )
    sign = 1 if is_better_high(name, task) else -1
    value = metrics[name]
    is_best = not math.isnan(value) and (before.best is None or sign * value > sign * before.best)
    num_since = 0 if is_best else before.num_since + 1
    patience = stage.select.patience
    return Verdict(
        best=value if is_best else before.best,
        num_since=num_since,
        is_best=is_best,
        is_enough=patience is not None and num_since >= patience,
    )


def is_better_high(metric: str, task: Any) -> bool:
    """Return whether a higher value of a metric is better."""
    if metric == task.metric:
        return bool(task.is_better_high)
    return metric not in ("loss", "perplexity", "mse", "mae")
