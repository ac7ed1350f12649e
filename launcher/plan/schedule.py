"""What is due after step N, and the learning rate at it: the only place with a modulo on steps. Pure."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The calendar of one stage. A step is counted when it is done: steps run from 1 to `num_steps`."""

    num_steps: int
    warmup_steps: int
    learning_rate: float
    kind: Literal["linear", "cosine", "constant"]
    eval_every: int | None
    save_every: int | None

    def lr(self, step: int) -> float:
        """Return the learning rate that step `step` (from 1) is made with.

        Linear warm-up from 0, then linear or cosine decay to 0, as in transformers'
        `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`: step n uses their
        factor after n - 1 updates.
        """
        done = step - 1
        if done < self.warmup_steps:
            return self.learning_rate * done / max(1, self.warmup_steps)
        if self.kind == "constant":
            return self.learning_rate
        progress = (done - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.learning_rate * max(0.0, 1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def eval_due(self, step: int) -> bool:
        """Tell whether to evaluate after `step`; always after the last."""
        return step == self.num_steps or bool(self.eval_every) and step % (self.eval_every or 1) == 0

    def save_due(self, step: int, *, wanted: bool = False) -> bool:
        """Tell whether to save after `step`; always after the last, and when `wanted` for another reason."""
        on_schedule = bool(self.save_every) and step % (self.save_every or 1) == 0
        return step == self.num_steps or wanted or on_schedule
