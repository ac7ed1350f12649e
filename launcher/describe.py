"""What there is to prepare: every data set's files, chunks and settings, written down as its manifest."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher import lean, storage, survey, tasks
from launcher import recipe as recipes
from launcher.data import source, store
from launcher.data.order import blocks_at
from launcher.errors import LauncherError
from launcher.plan import plan as planning
from launcher.plan.plan import ModelFacts
from launcher.prepare import StoreJob
from launcher.recipe import DataSet, Recipe, Stage

STORE_VERSION = 3
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES, MANY_CHUNKS = 4 << 20, 64 << 20, 4096


@dataclass(frozen=True, slots=True)
class Described:
    """What there is to prepare, and the first weights."""

    jobs: tuple[StoreJob, ...]
    model_directory: str


def describe(
    recipe_tree: dict[str, Any], model_facts: ModelFacts, folder: str, chunk_bytes: int | None = None
) -> Described | LauncherError:
    """Look at all data sets, write the manifests of their stores, and make the first model's weights.

    Args:
        recipe_tree: the recipe as `recipe.dump` gives it.
        model_facts: of the first model.
        folder: where the stores are kept; seen by all workers.
        chunk_bytes: input of one task, about. Default: by the size of the data.
    """
    try:
        with lean.imports():
            from launcher.train import model as models  # transformers: not in the driver's process

        recipe = recipes.parse(recipe_tree)
        tokenizer = models.load_tokenizer(recipe.model)
        config = models.config_of(recipe.model, len(tokenizer))
        own_template = tokenizer.chat_template
        jobs: list[StoreJob] = []
        for i in range(len(recipe.stages)):
            tokenizer.chat_template = own_template  # A task puts its own in place.
            given = (tokenizer, config, model_facts)
            jobs += _jobs_of_stage(recipe_tree, recipe, i, given, Path(folder), chunk_bytes)
        return Described(tuple(jobs), _first_model(recipe, tokenizer, Path(folder)))
    except LauncherError as error:
        return error


def _jobs_of_stage(
    tree: dict[str, Any],
    recipe: Recipe,
    index: int,
    given: tuple[Any, Any, ModelFacts],
    folder: Path,
    chunk_bytes: int | None,
) -> list[StoreJob]:
    (tokenizer, config, model_facts), stage, jobs = given, recipe.stages[index], []
    limit = planning.max_length(stage, model_facts)
    label_stamps = _label_stamps(stage)
    labels_from, labels_key = "", _labels_key(stage, label_stamps)
    for split in ("train", "eval"):
        for number, data_set in enumerate(stage.data.data_sets(split)):  # type: ignore[arg-type]
            settings = [*_settings(stage, data_set, tokenizer, limit), labels_key]
            files = survey.files_of(data_set)
            task = tasks.create(stage.seen_by(data_set))
            present = source.column_names(files[:1])
            # What the first file has and the task reads, the others must have alike.
            source.column_names(files, task.columns(present))
            task.set_tokenizer(tokenizer, limit)
            task.check_config(config)  # Some compare it with the tokenizer.
            settings.append([tokenizer.chat_template, task.has_eval_features and split])
            directory, manifest = _new_manifest(
                files, settings, task, data_set, present, folder, chunk_bytes, label_stamps
            )
            labels_from = labels_from or (str(directory) if labels_key else "")
            jobs.append(
                StoreJob(
                    directory=str(directory),
                    recipe=tree,
                    stage=index,
                    split=split,  # type: ignore[arg-type]
                    number=number,
                    max_length=limit,
                    about_rows=survey.rows_of(files, data_set)[0],
                    num_chunks=manifest.num_chunks,
                    is_bounded=manifest.is_bounded,
                    order=_order(manifest, split, stage.seed),
                    labels_from=labels_from,
                )
            )
    return jobs


def _label_stamps(stage: Stage) -> list[list[tuple[str, int, int]]]:
    """The files that tell the labels, if the rows do: all train data sets together.

    Where one of them changes, labels may get other numbers.
    """
    if stage.data.labels is not None or tasks.create(stage).label_column is None:
        return []
    return [_stamps(survey.files_of(each)) for each in stage.data.data_sets("train")]


def _labels_key(stage: Stage, label_stamps: list[list[tuple[str, int, int]]]) -> list[Any]:
    """The same by names and sizes alone, for the order."""
    sets = stage.data.data_sets("train")
    return [
        [each.model_dump(mode="json", exclude={"path", "weight"}), *_named(stamps)]
        for each, stamps in zip(sets, label_stamps, strict=False)
    ]


def _stamps(files: list[str]) -> list[tuple[str, int, int]]:
    return [(file, *source.stamp(file)) for file in files]


def _named(stamps: list[tuple[str, int, int]]) -> list[list[Any]]:
    return [[os.path.basename(file), size] for file, size, _ in stamps]


def _new_manifest(
    files: list[str],
    settings: list[Any],
    task: Any,
    data_set: DataSet,
    present: list[str],
    folder: Path,
    chunk_bytes: int | None,
    label_stamps: list[Any],
) -> tuple[Path, store.Manifest]:
    stamps = _stamps(files)
    if chunk_bytes is None:
        # Small chunks begin sooner; too many files would be a burden on the disk and on every rank.
        total_bytes = sum(size for _, size, _ in stamps)
        chunk_bytes = min(MOST_CHUNK_BYTES, max(LEAST_CHUNK_BYTES, total_bytes // MANY_CHUNKS))
    fingerprint = digest([STORE_VERSION, settings, _named(stamps), chunk_bytes])
    chunks = source.chunks(files, chunk_bytes)
    is_bounded = all(chunk.is_bounded for chunk in chunks)
    counted = [chunk.num_rows for chunk in chunks]
    keeps_all = not data_set.filters and data_set.part is None
    is_nominal = task.one_sample_per_row and keeps_all and is_bounded and None not in counted
    manifest = store.Manifest(
        fingerprint=fingerprint,
        files=tuple(stamps),
        columns=tuple(present),
        chunk_bytes=chunk_bytes,
        num_chunks=len(chunks),
        nominal=tuple(n or 0 for n in counted) if is_nominal else None,
        is_bounded=is_bounded,
    )
    directory = folder / f"tokens-{digest([fingerprint, stamps, label_stamps])[:20]}"
    if (known := store.read_manifest(directory)) != manifest:
        if known is not None:
            storage.delete(directory)
        with store.writing(folder):
            store.write_manifest(directory, manifest)
    # Before it has a run directory, nothing else shows that a run is about to train from here.
    (directory / store.USED).touch()
    return directory, manifest


def _order(manifest: store.Manifest, split: str, seed: int) -> tuple[int, ...]:
    """The chunks as the first epoch wants them, so that its first window is made first."""
    chunks = np.arange(manifest.num_chunks, dtype=np.int64)
    if split == "train" and manifest.is_bounded:
        chunks = blocks_at(chunks, len(chunks), fingerprint=manifest.fingerprint, seed=seed, epoch=0)
    return tuple(chunks.tolist())


def _settings(stage: Stage, data_set: DataSet, tokenizer: Any, limit: int) -> list[Any]:
    """What decides the tokens of a row."""
    data = stage.data.model_dump(mode="json", exclude={"train", "eval", "eval_fraction", "bad_row_limit"})
    of_set = data_set.model_dump(mode="json", exclude={"path", "weight"})
    of_task = [stage.task, stage.answers.model_dump(), stage.generation.exact_match]
    return [of_task, data, of_set, limit, _tokenizer_digest(tokenizer)]


def _tokenizer_digest(tokenizer: Any) -> str:
    of_transformers = [
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.truncation_side,
        tokenizer.split_special_tokens,
        tokenizer.model_input_names,
    ]
    return digest([tokenizer.backend_tokenizer.to_str(), of_transformers])


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _first_model(recipe: Recipe, tokenizer: Any, folder: Path) -> str:
    """Return where the first weights are; made here if they are not the model's own."""
    from launcher.train import model as models

    asked, auto_model = recipe.model, tasks.create(recipe.stages[0]).auto_model
    if asked.path is not None and not asked.add_tokens:
        return asked.path
    origin: Any = [asked.path, asked.revision]
    if isinstance(asked.config, str):
        path = Path(asked.config)
        origin = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    elif asked.config is not None:
        origin = asked.config
    key = digest([json.dumps(origin, sort_keys=True), auto_model, asked.init_seed, len(tokenizer)])
    directory = folder / f"model-{key[:20]}"
    if not directory.exists():
        with storage.new_directory(directory) as aside:
            make = models.grow if asked.config is None else models.initialise
            make(asked, auto_model, aside, len(tokenizer))
    # What was used lately is not freed: this run has no directory yet that says what it needs.
    (directory / store.USED).touch()
    return str(directory)
