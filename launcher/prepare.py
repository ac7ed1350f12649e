"""Rows to tokens, before and outside the training: what one CPU task does, on Ray or in this process.

Errors are returned as values, so that they arrive without a remote traceback.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launcher import recipe as recipes
from launcher import storage, tasks
from launcher.data import source, store
from launcher.data.pack import best_fit
from launcher.errors import DataError, LauncherError

LABELS = "labels.json"
BAD_ROWS = "bad_rows.jsonl"
# An unbounded chunk (a large .gz, say) makes a block whenever it has so many tokens.
TOKENS_PER_BLOCK = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreJob:
    """One token store to be made: one data set of one split of one stage. Plain data, sent to tasks.

    Attributes:
        directory: the store's.
        recipe: the recipe as `recipe.dump` gives it.
        stage, split, number: which data set of it.
        max_length: tokens of a sample.
        about_rows: rows by the headers, or an estimate.
        num_chunks: tasks that make it.
        is_bounded: whether each of them is short.
        order: the chunks in the order in which training will want them.
        labels_from: directory of the store whose rows tell the labels; "" if none do.
    """

    directory: str
    recipe: dict[str, Any]
    stage: int
    split: Literal["train", "eval"]
    number: int
    max_length: int
    about_rows: int
    num_chunks: int
    is_bounded: bool
    order: tuple[int, ...]
    labels_from: str

    @property
    def name(self) -> str:
        """How a person calls it: the stage, and the split unless it is train."""
        stage = self.recipe["stages"][self.stage]["name"]
        return stage if self.split == "train" else f"{stage} eval"


def make_chunk(job: StoreJob, chunk: int) -> store.Counts | LauncherError:
    """Make the blocks of one chunk, unless they are there.

    Returns:
        The counts of its blocks together.
    """
    try:
        known = chunk_counts(job, chunk)
        return known if known is not None else _make(job, chunk)
    except LauncherError as error:
        return error


def label_values(job: StoreJob, chunk: int) -> list[Any] | LauncherError:
    """Return the different labels that the rows of one chunk hold."""
    try:
        task, piece = _task(job), _chunks(job)[chunk]
        skip = BadRows(_data(job).on_bad_row, limit=None)
        found: set[Any] = set()
        for rows in _read(job, piece, [task.label_column], skip):
            for value in rows.columns[task.label_column]:
                found.update(v for v in _each(value) if isinstance(v, str | int))
        return list(found)
    except LauncherError as error:
        return error


def _each(value: Any) -> Sequence[Any]:
    """A row's label, or its labels."""
    return value if isinstance(value, list | tuple) else (value,)


def settle_labels(job: StoreJob, found: set[Any]) -> None:
    """Write down the labels of a train split, from the values found in all its data sets.

    Raises:
        DataError: there are too few.
    """
    task = _task(job)
    rows = source.Rows(job.directory, {task.label_column: list(found)}, range(len(found)))
    storage.write_json(Path(job.directory) / LABELS, list(task.labels([rows])))


def labels_of(job: StoreJob) -> tuple[str, ...] | None:
    """Return the label words of a job's task, once they are settled."""
    if not job.labels_from:
        return tuple(job.recipe["stages"][job.stage]["data"].get("labels") or ())
    labels = storage.read_json(Path(job.labels_from) / LABELS)
    return None if labels is None else tuple(labels)


def chunk_counts(job: StoreJob, chunk: int) -> store.Counts | None:
    """Return the counts of a chunk that is made; None if it is not, or not whole."""
    names = chunk_blocks(job, chunk)
    if names is None:
        return None
    total = store.Counts()
    for name in names:
        found = store.block_counts(Path(job.directory) / name)
        if found is None:
            return None
        total += found[0]
    return total


def chunk_blocks(job: StoreJob, chunk: int) -> list[str] | None:
    """Return the files of a chunk's blocks; None where it is not known yet how many there are."""
    manifest = manifest_of(job.directory)
    if manifest.is_bounded:
        return [store.block_name(chunk)]
    num_parts = storage.read_json(Path(job.directory) / f"chunk-{chunk:06d}.json")
    return None if num_parts is None else [store.block_name(chunk, part) for part in range(num_parts)]


def finish(job: StoreJob) -> store.Counts:
    """Make a store whole: list the bad rows, write the record that all is there.

    Raises:
        DataError: there is nothing to train on.
    """
    directory = Path(job.directory)
    names = [name for chunk in range(job.num_chunks) for name in chunk_blocks(job, chunk) or []]
    bad = [line for chunk in range(job.num_chunks) for line in storage.read_json(_bad_file(job, chunk)) or []]
    limit = _data(job).bad_row_limit
    if len(bad) > limit:
        raise DataError(
            f"{job.name}: {len(bad)} bad rows, more than bad_row_limit ({limit}); the first:"
            f" {bad[0]['where']}: {bad[0]['reason']}"
        )
    if bad:
        storage.write_text(directory / BAD_ROWS, "".join(json.dumps(row) + "\n" for row in bad))
    counts = store.commit(directory, names)
    if counts.num_samples == 0:
        storage.delete(directory / store.META)
        raise DataError(f"{manifest_of(job.directory).files[0][0]}: {_nothing(job, counts)}")
    return counts


def _nothing(job: StoreJob, counts: store.Counts) -> str:
    """Say why a store has no sample."""
    data_set = _data(job).data_sets(job.split)[job.number]
    if counts.num_rows:
        return "has no row with anything to learn within max_length"
    if data_set.filters:
        return f"none of its rows pass the filters {[list(each) for each in data_set.filters]}"
    if data_set.part is not None:
        low, high = data_set.part
        return f"none of its rows fall into the part {low:g} to {high:g}: take a larger part or eval_fraction"
    return "has no rows"


class BadRows:
    """What to do about rows that cannot be used; called with the place and the fault."""

    def __init__(self, policy: str, *, limit: int | None) -> None:
        self.policy, self.limit = policy, limit
        self.rows: list[dict[str, str]] = []

    def __call__(self, where: str, reason: str) -> None:
        """List a row, or stop.

        Raises:
            DataError: the policy is `error`, or there are more than the limit.
        """
        if self.policy == "error":
            raise DataError(f"{where}: {reason}")
        self.rows.append({"where": where, "reason": reason})
        if self.limit is not None and len(self.rows) > self.limit:
            raise DataError(
                f"{where}: {reason} (and {self.limit:,} bad rows before it: bad_row_limit is reached)"
            )


def _make(job: StoreJob, chunk: int) -> store.Counts:
    directory, manifest = Path(job.directory), manifest_of(job.directory)
    labels = labels_of(job)
    assert labels is not None, "labels are settled before the first chunk is made"
    task, data = _task(job), _data(job)
    reject = BadRows(data.on_bad_row, limit=data.bad_row_limit)
    gathered, total, part = _Gathered(), store.Counts(), 0
    columns = task.columns(manifest.columns)
    for rows in _read(job, _chunks(job)[chunk], columns, reject):
        gathered.add(rows.num_rows, task.features(rows, labels, reject))
        if not manifest.is_bounded and gathered.num_tokens >= TOKENS_PER_BLOCK:
            total += gathered.write(directory / store.block_name(chunk, part), job, manifest, 0)
            gathered, part = _Gathered(), part + 1
    if reject.rows:
        storage.write_json(_bad_file(job, chunk), reject.rows)
    name = store.block_name(chunk) if manifest.is_bounded else store.block_name(chunk, part)
    total += gathered.write(directory / name, job, manifest, len(reject.rows))
    if not manifest.is_bounded:
        storage.write_json(directory / f"chunk-{chunk:06d}.json", part + 1)
    return total


class _Gathered:
    """The samples of one block, as they come."""

    def __init__(self) -> None:
        self.features: list[Any] = []
        self.num_rows = self.num_tokens = 0

    def add(self, num_rows: int, features: Any) -> None:
        self.features.append(features)
        self.num_rows += num_rows
        self.num_tokens += len(features.ragged[store.INPUT_IDS][0])

    def write(self, file: Path, job: StoreJob, manifest: store.Manifest, num_bad: int) -> store.Counts:
        ragged = {
            name: (
                np.concatenate([f.ragged[name][0] for f in self.features]),
                np.concatenate([f.ragged[name][1] for f in self.features]),
            )
            for name in (self.features[0].ragged if self.features else ())
        }
        scalars = {
            name: np.concatenate([f.scalars[name] for f in self.features])
            for name in (self.features[0].scalars if self.features else ())
        }
        if not self.features:
            ragged[store.INPUT_IDS] = (np.empty(0, np.int32), np.empty(0, np.int64))
            scalars[store.NUM_TARGETS] = np.empty(0, np.int32)
        lengths = ragged[store.INPUT_IDS][1]
        pack = None
        if job.recipe["stages"][job.stage]["task"] == "causal-lm":
            pack = best_fit(lengths, job.max_length, key=f"{manifest.fingerprint}/{file.name}")
        counts = store.Counts(
            num_rows=self.num_rows + num_bad,
            num_samples=len(lengths),
            num_packs=0 if pack is None or not len(pack) else int(pack.max()) + 1,
            num_skipped=sum(f.num_skipped for f in self.features),
            num_bad=num_bad,
            num_cut=sum(f.num_cut for f in self.features),
            num_cut_tokens=sum(f.num_cut_tokens for f in self.features),
            num_tokens=int(lengths.sum()),
            num_targets=int(scalars[store.NUM_TARGETS].sum(dtype=np.int64)),
        )
        store.write_block(file, ragged, scalars, counts, pack=pack)
        return counts


def _data(job: StoreJob) -> recipes.Data:
    return recipes.parse(job.recipe).stages[job.stage].data


def _task(job: StoreJob) -> Any:
    return _cached_task(
        json.dumps(job.recipe), job.stage, job.split, job.number, job.directory, job.max_length
    )


# A task process makes many chunks: what they share is loaded once.
@functools.lru_cache(maxsize=8)
def _cached_task(recipe: str, stage: int, split: str, number: int, directory: str, limit: int) -> Any:
    from launcher.train import model as models

    asked = recipes.parse(json.loads(recipe))
    data_set = asked.stages[stage].data.data_sets(split)[number]  # type: ignore[arg-type]
    task = tasks.create(asked.stages[stage].seen_by(data_set))
    task.for_eval = split == "eval"
    task.columns(manifest_of(directory).columns)
    task.set_tokenizer(models.load_tokenizer(asked.model), limit)
    return task


@functools.lru_cache(maxsize=8)
def manifest_of(directory: str) -> store.Manifest:
    found = store.read_manifest(Path(directory))
    assert found is not None, "described before anything is made"
    return found


def _chunks(job: StoreJob) -> list[source.Chunk]:
    return _cached_chunks(job.directory)


@functools.lru_cache(maxsize=8)
def _cached_chunks(directory: str) -> list[source.Chunk]:
    manifest = manifest_of(directory)
    return source.chunks([file for file, *_ in manifest.files], manifest.chunk_bytes)


def _read(job: StoreJob, chunk: source.Chunk, columns: list[str], reject: BadRows) -> Iterator[source.Rows]:
    data_set = _data(job).data_sets(job.split)[job.number]
    filters = data_set.filters or None
    return source.read(chunk, columns, filters=filters, part=data_set.part, reject=reject)


def _bad_file(job: StoreJob, chunk: int) -> Path:
    return Path(job.directory) / f"bad-{chunk:06d}.json"
