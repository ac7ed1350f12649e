"""What DeepSpeed wraps: the model of a stage, or of several that are trained jointly on one trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.errors import ModelError

if TYPE_CHECKING:
    from launcher.tasks.base import Outputs, Task


class Parts(nn.Module):
    """One part for each stage in training: its transformers model, and what its task has beside it.

    All parts run in one forward, in the same order on every rank: ranks meet in ZeRO's collectives.
    """

    def __init__(self, tasks: Sequence[Task], models: Sequence[Any], extras: Sequence[Any]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.models = nn.ModuleList(models)
        self.extras = nn.ModuleDict({str(i): extra for i, extra in enumerate(extras) if extra is not None})

    def extra(self, index: int) -> Any:
        """Return the parameters of a part's task beside its model; None if there are none."""
        return dict(self.extras.items()).get(str(index))

    def forward(self, batches: list[dict[str, Any] | None]) -> list[Outputs | None]:
        """Return each part's outputs on its batch, as its model takes it; None where it has none."""
        return [
            None if batch is None else self.tasks[i].outputs(self.models[i], self.extra(i), batch)
            for i, batch in enumerate(batches)
        ]


def share_trunk(models: Sequence[Any]) -> None:
    """Let several models have one trunk: the largest of theirs, since some lack a pooler.

    Raises:
        ModelError: their trunks are of different kinds.
    """
    if all(model is models[0] for model in models):
        return
    trunks = [getattr(model, model.base_model_prefix, model) for model in models]
    largest = max(trunks, key=lambda trunk: sum(1 for _ in trunk.parameters()))
    for model, trunk in zip(models, trunks, strict=True):
        if type(trunk) is not type(largest):
            raise ModelError(
                f"transfer: joint needs one trunk, but {type(model).__name__} has a {type(trunk).__name__} and"
                f" another stage a {type(largest).__name__}: train these stages in sequence"
            )
        setattr(model, model.base_model_prefix, largest)
        # Output layers that were tied to the trunk's embeddings now belong to those of the shared one.
        model.tie_weights()
