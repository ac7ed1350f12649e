"""Where a run's record goes besides its own files: one file for each outside service, all of one shape."""

from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any, Literal, Protocol

from launcher.errors import RecipeError
from launcher.report.points import Point

Status = Literal["done", "failed", "stopped", "open"]
"""How a run's try ended; `open`: nobody knows, since its driver was killed."""
FOLDER = "trackers"
"""In the run directory: what each tracker knows of the run."""
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a tracker is told of a run once.

    Attributes:
        parameters: the recipe and the ds config, by path.
        tags: by name.
    """

    run_dir: Path
    name: str
    parameters: dict[str, Any]
    tags: dict[str, str]


class Tracker(Protocol):
    """One outside service. Any method may raise whatever its library does."""

    def begin(self, known: str | None) -> str:
        """Go on with the tracker's run of this id, or begin a new one; return its id."""

    def send(self, points: list[Point]) -> None:
        """Take points over for good: what returns need not be sent again."""

    def end(self, status: Status, final: dict[str, float]) -> None:
        """Tell how the run ended, with its last numbers, and let go."""


def create(asked: Any, about: About) -> Tracker:
    """Return the tracker that a recipe's section names."""
    made: Tracker = import_module(f"launcher.trackers.to_{asked.kind}").create(asked, about)
    return made


def check(trackers: tuple[Any, ...]) -> None:
    """Refuse what cannot work on this machine.

    Raises:
        RecipeError: a tracker's package is not installed, or it does not know where to write.
    """
    for asked in trackers:
        need(asked.kind, _PACKAGES[asked.kind], f"trackers: {asked.kind}")
        check_one = getattr(import_module(f"launcher.trackers.to_{asked.kind}"), "check", None)
        if check_one is not None:
            check_one(asked)


def need(module: str, package: str, what: str) -> None:
    """Refuse where a package is not installed; `what` needs it."""
    if util.find_spec(module) is None:
        raise RecipeError(f"{what} is not installed here: pip install -c constraints.txt {package}")


def names(trackers: tuple[Any, ...]) -> list[str]:
    """Return a name for each: its kind, with a number from the second of a kind on."""
    found: list[str] = []
    for asked in trackers:
        number = 1 + sum(name.partition("-")[0] == asked.kind for name in found)
        found.append(asked.kind if number == 1 else f"{asked.kind}-{number}")
    return found


def run_name(run_dir: Path) -> str:
    """Return what a run is called: of several that differ by chance, the number alone would say nothing."""
    return f"{run_dir.parent.name}-{run_dir.name}" if run_dir.name.startswith("seed-") else run_dir.name
