"""What is known of the data so far, and what training has to wait for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import prepare
from launcher import recipe as recipes
from launcher.data import store
from launcher.data.order import BLOCKS_PER_WINDOW
from launcher.describe import Described, describe, digest
from launcher.errors import LauncherError
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts
from launcher.preparation import make_all
from launcher.prepare import StoreJob
from launcher.recipe import Recipe, in_tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the workers need to begin.

    Attributes:
        facts: of each stage's data.
        model_directory: the first weights.
        data_files: by data set, path and bytes of each file: what the run began with.
        stores: the names of the directories, beside the runs', that it trains from.
    """

    facts: tuple[StageFacts, ...]
    model_directory: str
    data_files: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    stores: tuple[str, ...] = ()


def prepare_all(
    recipe_tree: dict[str, Any], model_facts: ModelFacts, folder: str, chunk_bytes: int | None = None
) -> Prepared:
    """Make everything in this process, one chunk after another.

    Raises:
        LauncherError: the data cannot be used.
    """
    described = describe(recipe_tree, model_facts, folder, chunk_bytes)
    if isinstance(described, LauncherError):
        raise described
    make_all(described.jobs)
    return Prepared(facts(recipes.parse(recipe_tree), described), described.model_directory)


def needed_first(
    recipe: Recipe, described: Described, is_packed: Sequence[bool]
) -> tuple[list[StoreJob], list[StoreJob]]:
    """Return the stores that have to be whole before training, and those of which a window is enough.

    A stage can begin on a part of its data when its number of steps does not depend on the rest: when
    headers tell the samples of an epoch, or when the recipe gives the steps. What is no larger than a
    window is always made whole first, so that its mistakes are told before anything is trained.

    Args:
        recipe: what was asked.
        described: what there is.
        is_packed: for each stage, whether its units are packs.
    """
    whole, first = [], []
    for i, stage in enumerate(recipe.stages):
        train = [job for job in described.jobs if job.stage == i and job.split == "train"]
        manifests = [prepare.manifest_of(job.directory) for job in train]
        in_samples = in_tokens(stage.global_batch) is None or is_packed[i]
        is_known = all(m.nominal is not None for m in manifests) and not is_packed[i]
        is_given = stage.steps is not None and len(train) == 1 and manifests[0].is_bounded
        evaluated = [job for job in described.jobs if job.stage == i and job.split == "eval"]
        is_small = all(job.num_chunks <= BLOCKS_PER_WINDOW and job.is_bounded for job in train)
        if is_small or not (in_samples and (is_known or is_given)):
            whole += train
        elif i == 0:
            first += train
        whole += [job for job in evaluated if job.num_chunks <= BLOCKS_PER_WINDOW and job.is_bounded]
    return whole, first


def facts(recipe: Recipe, described: Described) -> tuple[StageFacts, ...]:
    """Return what is known of every stage's data now."""
    result = []
    for i, stage in enumerate(recipe.stages):
        splits = {
            split: [job for job in described.jobs if job.stage == i and job.split == split]
            for split in ("train", "eval")
        }
        weights = tuple(data_set.weight for data_set in stage.data.data_sets("train"))
        evaluated = _split_facts(splits["eval"], ()) if splits["eval"] else None
        result.append(StageFacts(train=_split_facts(splits["train"], weights), eval=evaluated))
    return tuple(result)


def _split_facts(jobs: Sequence[StoreJob], weights: tuple[float, ...]) -> SplitFacts:
    manifests = [prepare.manifest_of(job.directory) for job in jobs]
    metas = [store.read_meta(Path(job.directory)) for job in jobs]
    total = store.Counts()
    for meta in metas:
        total += store.Counts(**meta["counts"]) if meta else store.Counts()
    places = [
        sum(manifest.nominal)
        if manifest.nominal is not None
        else meta["counts"]["num_samples"]
        if meta
        else job.about_rows
        for job, manifest, meta in zip(jobs, manifests, metas, strict=True)
    ]
    is_whole = None not in metas
    keys = [manifest.fingerprint for manifest in manifests]
    return SplitFacts(
        about_rows=sum(job.about_rows for job in jobs),
        num_samples=sum(places),
        is_settled=is_whole or all(manifest.nominal is not None for manifest in manifests),
        is_whole=is_whole,
        stores=tuple(job.directory for job in jobs),
        weights=weights,
        fingerprint=keys[0] if len(keys) == 1 else digest([keys, weights]),
        num_skipped=total.num_skipped,
        num_bad=total.num_bad,
        num_cut=total.num_cut,
        num_cut_tokens=total.num_cut_tokens,
        num_tokens=total.num_tokens,
        num_targets=total.num_targets,
        num_packs=total.num_packs,
        labels=prepare.labels_of(jobs[0]) or (),
    )
