"""Where a new run begins: at a checkpoint of another run, whose stages before it are taken over."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from launcher import storage
from launcher.errors import RunExists, nearest
from launcher.recipe import Recipe

NOTE = "resumed_from.json"
_STAGES, _CHECKPOINTS, _COMMIT, _DONE = "stages", "checkpoints", "commit.json", "done.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """A place in another run.

    Attributes:
        run_dir: of that run.
        taken: stages that are taken over whole.
        stage: the one that goes on; None: the run goes on with the stage after those taken.
        step: after which it goes on.
    """

    run_dir: Path
    taken: tuple[str, ...]
    stage: str | None
    step: int


def find(text: str, run_root: Path, recipe: Recipe) -> Origin:
    """Return the place that `RUN` or `RUN@step` means.

    Args:
        text: a run directory or a run's name, perhaps with the step whose checkpoint is meant.
        run_root: where names are looked up.
        recipe: of the new run.

    Raises:
        RunExists: there is no such run, or no such checkpoint.
    """
    name, _, number = text.rpartition("@") if text.rpartition("@")[2].isdigit() else (text, "", "")
    run_dir = Path(name) if Path(name).is_dir() else run_root / name
    if not (run_dir / _STAGES).is_dir():
        known = [path.name for path in run_root.iterdir()] if run_root.is_dir() else []
        raise RunExists(f"--resume-from {text}: {run_dir} is no run directory{nearest(name, known)}")
    names = [stage.name for stage in recipe.stages]
    there = {each: _steps(run_dir, each) for each in names}
    if number:
        at = [each for each in names if int(number) in there[each]]
        if not at:
            told = "; ".join(
                f"{each}: {', '.join(map(str, steps))}" for each, steps in there.items() if steps
            )
            raise RunExists(f"--resume-from {text}: no checkpoint of that step; there are: {told or 'none'}")
        return Origin(run_dir, tuple(names[: names.index(at[-1])]), at[-1], int(number))
    taken = []
    for each in names:
        if not (run_dir / _STAGES / each / _DONE).exists():
            break
        taken.append(each)
    following = names[len(taken)] if len(taken) < len(names) else None
    if following is not None and there[following]:
        return Origin(run_dir, tuple(taken), following, there[following][-1])
    if not taken:
        raise RunExists(f"--resume-from {text}: has neither a finished stage of this recipe nor a checkpoint")
    return Origin(run_dir, tuple(taken), None, 0)


def take_over(origin: Origin, run_dir: Path) -> str:
    """Put the origin's stages and checkpoint into a new run's directory; return what was done in words.

    Files are linked where the file system can, so nothing is copied; neither run ever changes one.

    Raises:
        RunExists: a stage before the checkpoint is not finished, or the checkpoint was deleted meanwhile.
    """
    for name in origin.taken:
        if not (origin.run_dir / _STAGES / name / _DONE).exists():
            raise RunExists(f"{origin.run_dir}: its stage {name} is not finished")
        for part in (_DONE, "export", "adapter", "examples.json"):
            _link(origin.run_dir / _STAGES / name / part, run_dir / _STAGES / name / part)
    said = [f"stage {name} as it ended" for name in origin.taken]
    if origin.stage is not None:
        checkpoint = Path(_STAGES) / origin.stage / _CHECKPOINTS / f"step-{origin.step:08d}"
        if not (origin.run_dir / checkpoint / _COMMIT).exists():
            raise RunExists(
                f"{origin.run_dir / checkpoint}: was there when this run was started, and is gone"
            )
        _link(origin.run_dir / checkpoint, run_dir / checkpoint)
        said.append(f"stage {origin.stage} after step {origin.step}")
    note = {
        "run": str(origin.run_dir),
        "taken": list(origin.taken),
        "stage": origin.stage,
        "step": origin.step,
    }
    storage.write_json(run_dir / NOTE, note)
    return f"from {origin.run_dir}: {', '.join(said)}"


def _steps(run_dir: Path, stage: str) -> list[int]:
    found = (run_dir / _STAGES / stage / _CHECKPOINTS).glob(f"step-*/{_COMMIT}")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def _link(source: Path, target: Path) -> None:
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        _link_file(str(source), str(target))
    else:
        shutil.copytree(source, target, copy_function=_link_file, dirs_exist_ok=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
