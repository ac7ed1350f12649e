"""A text's label as a number (`data.label_type: number`): regression."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from launcher import exact
from launcher.errors import DataError
from launcher.recipe import Stage
from launcher.tasks import base, label_types

if TYPE_CHECKING:
    from launcher.data.source import Rows


class Number:
    """A number; judged by Pearson's correlation.

    A store holds whole numbers only, so the bits of the float32 are kept as an int32. The mark -100 cannot
    clash: as a float32 its bits are a NaN, and NaN is refused.
    """

    metric = "pearson"
    score = ""
    column = None
    fewest = 0

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.words: tuple[str, ...] = ()
        if stage.data.labels is not None:
            raise DataError(
                f"stages.{stage.name}.data.labels: label_type: number has no labels: remove one of the two"
            )

    def model_options(self) -> dict[str, Any]:
        """See `Task.model_options`."""
        return {"num_labels": 1, "problem_type": "regression"}

    def read(self, rows: "Rows", values: list[Any], reject: base.Reject, bad: set[int]) -> np.ndarray:
        """Return the bits of each row's number as int32; anything for the rows in `bad`."""
        numbers = np.fromiter(map(_number, values), dtype=np.float64, count=len(values))
        with np.errstate(over="ignore"):
            small = numbers.astype(np.float32)
        name = self.stage.data.columns.get("label", "label")
        for i in np.flatnonzero(~np.isfinite(small)).tolist():
            fault = (
                f'column "{name}" is {label_types.kind(values[i])}: label_type: number needs a finite number'
            )
            label_types.reject_row(rows, i, fault, reject, bad)
        return small.view(np.int32)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the squared errors."""
        known, true = _numbers(labels)
        return ((logits.float().squeeze(-1) - true).square() * known).sum()

    def measure(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """Return float64 (16,): the sums of x, y, x², y², xy, |x - y|, (x - y)², 1; then what is too fine in
        them for multiples of 2^-20, times 2^20: else numbers much smaller than 1 would lose their variance."""
        known, true = _numbers(labels)
        x, y = logits.float().squeeze(-1)[known].double(), true[known].double()
        error = x - y
        columns = torch.stack([x, y, x * x, y * y, x * y, error.abs(), error * error, torch.ones_like(x)])
        sums = columns.sum(1)
        coarse = exact.rounded(sums)
        return torch.cat([coarse, (sums - coarse) * exact.FRACTION])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return mse, mae and pearson (0 where one side does not vary)."""
        x, y, xx, yy, xy, absolute, squared, count = (sums[:8] + sums[8:] / exact.FRACTION).tolist()
        if count == 0:
            return dict.fromkeys(("mse", "mae", "pearson"), math.nan)
        of_x, of_y = count * xx - x * x, count * yy - y * y
        pearson = 0.0
        # What is left of a constant's variance is rounding.
        if of_x > 1e-12 * count * xx and of_y > 1e-12 * count * yy:
            pearson = max(-1.0, min(1.0, (count * xy - x * y) / math.sqrt(of_x) / math.sqrt(of_y)))
        return {"mse": squared / count, "mae": absolute / count, "pearson": pearson}

    def tables(self, sums: Tensor) -> dict[str, Any]:
        """See `Task.tables`: none."""
        return {}

    def judged(self, logits: Tensor, labels: Tensor) -> list[tuple[bool | None, float | None, float]]:
        """Return of each row that it is neither right nor wrong, no score, and how far it is off."""
        _, true = _numbers(labels)
        errors = (logits.float().squeeze(-1) - true).abs().tolist()
        return [(None, None, error) for error in errors]

    def predicted(self, logits: Tensor, words: Sequence[str]) -> list[Any]:
        """Return each row's number."""
        return logits.float().squeeze(-1).tolist()

    def references(self, labels: Tensor) -> list[Any]:
        """Return each row's number; None where it has none."""
        known, true = _numbers(labels)
        return [y if k else None for k, y in zip(known.tolist(), true.tolist(), strict=True)]

    def line(self, prediction: Any) -> str:
        """Return a prediction as a line of text."""
        return f"{prediction:.4f}"


def _numbers(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where there is a number, and the numbers; 0 where there is none."""
    known = labels != base.IGNORED
    true = labels.to(torch.int32).view(torch.float32)
    return known, torch.where(known, true, torch.zeros_like(true))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
