"""Run directories: where a command's run is, whether it may be there, and its beginning."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from launcher import processes, storage
from launcher.errors import RecipeError, RunExists

AUTO = "auto"


def of(options: argparse.Namespace, recipe: Any, ds_config: dict[str, Any] | None) -> Path:
    """The run's place: a pure function of the command, so that the same command finds it again."""
    from launcher import recipe as recipes

    in_job = processes.is_of_a_job()
    # A submitted job runs in a copy of its working directory that is deleted afterwards.
    fallback = Path.home() / "launcher-runs" if in_job else Path("runs")
    root = options.run_root or os.environ.get("LAUNCHER_RUN_ROOT") or fallback
    if "://" in str(root):
        raise RecipeError(f"--run-root {root}: has to be a directory that all nodes see, not an address")
    begins = [options.resume_from] if options.resume_from else []
    content = json.dumps([recipes.identity(recipe), ds_config or AUTO, *begins], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    name = options.name or f"{options.recipe.stem}-{options.ds.stem}-{digest}"
    if options.seeds is not None:
        name += "-seeds"
    return Path(root).expanduser().absolute() / name


def check(run_dir: Path, recipe: Any, ds_config: dict[str, Any], *, fresh: bool) -> None:
    """Refuse a name that another recipe has used."""
    from launcher import recipe as recipes

    if fresh or not (run_dir / "recipe.yaml").exists():
        return
    text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    old, new = _identity(text).splitlines(), recipes.identity(recipe).splitlines()
    is_other_ds = storage.read_json(run_dir / "ds.json") != ds_config
    if old != new or is_other_ds:
        pairs = [f"{a.strip()} there, {b.strip()} here" for a, b in zip(old, new, strict=False) if a != b]
        what = pairs[0] if pairs else "another ds config" if is_other_ds else "another recipe"
        raise RunExists(
            f"{run_dir}: this name is in use with another recipe ({what}): give another --name, or --fresh"
            " to move the old run aside"
        )


def _identity(text: str) -> str:
    """The identity of a run that began with another version perhaps: its text as it stands, if it cannot be read."""
    import pydantic
    import yaml

    from launcher import recipe as recipes

    try:
        return recipes.identity(recipes.parse(yaml.safe_load(text)))
    except (pydantic.ValidationError, yaml.YAMLError):
        return text


def begin(run_dir: Path, recipe: Any, ds_config: dict[str, Any], *, fresh: bool) -> None:
    """Make the run directory, moving an old one aside when asked to begin anew."""
    from launcher import recipe as recipes

    if fresh and run_dir.exists():
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
            number += 1
        os.rename(run_dir, aside)
        print(f"the old run is kept in {aside}")
    storage.write_json(run_dir / "ds.json", ds_config)
    storage.write_text(run_dir / "recipe.yaml", recipes.to_yaml(recipe))
