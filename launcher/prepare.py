"""Rows to token stores, before any worker exists: runs on one CPU, as a Ray task or in this process."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher import recipe as recipes
from launcher import storage, tasks
from launcher.data import source, store
from launcher.errors import DataError, LauncherError
from launcher.plan import plan as planning
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts
from launcher.recipe import Recipe, Stage

STORE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the workers need to begin."""

    facts: tuple[StageFacts, ...]
    model_directory: str


def prepare(recipe_tree: dict[str, Any], model_facts: ModelFacts, folder: str) -> Prepared | LauncherError:
    """Make the token stores of all stages and, for a model from a config, its first weights.

    What exists already (same files, tokenizer and settings) is used again.

    Args:
        recipe_tree: the recipe as `recipe.dump` gives it.
        model_facts: of the first model.
        folder: where the stores are kept; seen by all workers.

    Returns:
        Facts and places; or the error, as a value, so that it arrives without a remote traceback.
    """
    try:
        from launcher.train import model as models  # transformers: not in the driver's process

        recipe = recipes.parse(recipe_tree)
        tokenizer = models.load_tokenizer(recipe.model)
        facts = tuple(_stage(recipe, stage, tokenizer, model_facts, Path(folder)) for stage in recipe.stages)
        directory = _first_model(recipe, tokenizer, Path(folder))
        return Prepared(facts, directory)
    except LauncherError as error:
        return error


def _stage(recipe: Recipe, stage: Stage, tokenizer: Any, model_facts: ModelFacts, folder: Path) -> StageFacts:
    limit = planning.max_length(stage, model_facts)
    train_files = source.list_files(stage.data.train)
    task = tasks.create(stage)
    task.columns(source.column_names(train_files))  # settles what a row is, and so the template
    task.set_tokenizer(tokenizer, limit)
    key = _key(recipe, stage, tokenizer, limit)
    train = _split(task, train_files, folder / _digest(key, train_files), None)
    if stage.data.eval is None:
        return StageFacts(train=train, eval=None)
    eval_files = source.list_files(stage.data.eval)
    eval_key = f"{key}/{train.labels}"
    evaluated = _split(task, eval_files, folder / _digest(eval_key, eval_files), train.labels)
    return StageFacts(train=train, eval=evaluated)


def _split(task: Any, files: list[str], path: Path, labels: tuple[str, ...] | None) -> SplitFacts:
    if (known := store.read_facts(path)) is not None:
        return known
    storage.delete(path)  # a store of another version, or a damaged one, would stay in the way
    columns = task.columns(source.column_names(files))
    if labels is None:
        labels = task.labels(source.batches(files, columns))
    counts = {"rows": 0, "skipped": 0}

    def parts() -> Iterator[dict[str, Any]]:
        for rows in source.batches(files, columns):
            features, num_skipped = task.features(rows, labels)
            counts["rows"] += len(next(iter(rows.columns.values())))
            counts["skipped"] += num_skipped
            if features["input_ids"]:
                yield {name: _column(values) for name, values in features.items()}
        if counts["rows"] == counts["skipped"]:
            what = (
                "has no rows" if not counts["rows"] else "has no row with anything to learn within max_length"
            )
            raise DataError(f"{files[0]}: {what}")

    return store.write_split(
        path,
        parts(),
        num_rows=lambda: counts["rows"],
        num_skipped=lambda: counts["skipped"],
        labels=labels,
    )


def _column(values: list[Any]) -> Any:
    """One integer a sample becomes an array; lists of integers stay what they are."""
    return np.asarray(values) if np.ndim(values[0]) == 0 else values


def _key(recipe: Recipe, stage: Stage, tokenizer: Any, limit: int) -> str:
    data = stage.data.model_dump(exclude={"train", "eval"})
    template = tokenizer.chat_template
    return json.dumps([STORE_VERSION, stage.task, data, limit, template, _tokenizer_digest(tokenizer)])


def _tokenizer_digest(tokenizer: Any) -> str:
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


def _digest(key: str, files: list[str]) -> str:
    stats = [[file, *source.stamp(file)] for file in files]
    return hashlib.blake2b(f"{key}{json.dumps(stats)}".encode(), digest_size=10).hexdigest()


def _first_model(recipe: Recipe, tokenizer: Any, folder: Path) -> str:
    if recipe.model.path is not None:
        return recipe.model.path
    from launcher.train import model as models

    auto_model = tasks.create(recipe.stages[0]).auto_model
    config = recipe.model.config
    if isinstance(config, str):
        path = Path(config)
        config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    key = json.dumps([config, auto_model, recipe.model.init_seed, len(tokenizer)], sort_keys=True)
    directory = folder / f"model-{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}"
    if not directory.exists():
        with storage.new_directory(directory) as aside:
            models.initialise(recipe.model, auto_model, aside, len(tokenizer))
    return str(directory)
