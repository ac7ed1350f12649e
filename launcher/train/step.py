"""What one optimizer step gives, and who says that it must not be made."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be done after a step: save, or save and leave. One rank's wish is all ranks'."""

    save: bool = False
    leave: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: the mean over the global batch; `losses`: of each part.
        wishes: of any rank.
        gradient_norm: of the whole gradient, before it is clipped.
        fault: why nothing was updated; empty: it was.
        micro_losses: of a step with a fault, by micro-batch of this rank and by part.
    """

    loss: float
    losses: list[float]
    gradient_norm: float
    learning_rate: float
    wishes: Wishes
    fault: str = ""
    micro_losses: list[list[float]] = field(default_factory=list)


class Fault(Protocol):
    """Says what is wrong with a step's loss and gradient norm; empty where nothing is."""

    def __call__(self, loss: float, norm: float, *, heals: bool = False) -> str: ...


def no_fault(loss: float, norm: float, *, heals: bool = False) -> str:
    """Find nothing wrong."""
    return ""
