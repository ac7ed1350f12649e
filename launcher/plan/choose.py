"""Which ds config, micro-batch and checkpointing to take: every way that fits, the quickest of them first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from launcher.plan.cluster import Cluster
from launcher.plan.forecast import Forecast, total_s
from launcher.plan.plan import DEFAULT_MICRO_BATCH
from launcher.recipe import Recipe, Stage

MORE_WORKERS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a recipe.

    Attributes:
        ds_name: of the ds config.
        ds_config: itself.
        recipe: with what this way changes of it.
        cluster: the machines, perhaps more than there are.
        says: what is different from what was asked, in words.
        forecasts: of its stages.
    """

    ds_name: str
    ds_config: dict[str, Any]
    recipe: Recipe
    cluster: Cluster
    says: tuple[str, ...]
    forecasts: tuple[Forecast, ...]

    @property
    def fits(self) -> bool:
        """Whether all stages fit."""
        return all(each.fits for each in self.forecasts)

    @property
    def total_s(self) -> float:
        """Seconds of all stages, about; 0 where unknown."""
        return total_s(self.forecasts)


Ask = Callable[[Recipe, str, Mapping[str, Any], Cluster], tuple[Forecast, ...]]
"""Forecasts of a recipe with a ds config (its name first) on a cluster."""


def cheapest(
    recipe: Recipe, configs: Sequence[tuple[str, dict[str, Any]]], cluster: Cluster, ask: Ask
) -> tuple[Way | None, list[Way]]:
    """Return the quickest way that fits, and one way for each config that was looked at.

    Args:
        recipe: what was asked.
        configs: names and contents, the simplest first: it wins where another is not a fiftieth quicker.
        cluster: the machines.
        ask: makes forecasts.
    """
    best: Way | None = None
    seen = []
    for name, config in configs:
        found = next((way for way in _ways(recipe, name, config, cluster, ask) if way.fits), None)
        seen.append(found or _way(recipe, name, config, cluster, (), ask))
        if found and (best is None or found.total_s < best.total_s * 0.98):
            best = found
    return best, seen


def nearest(
    recipe: Recipe,
    ds_name: str,
    ds_config: dict[str, Any],
    configs: Sequence[tuple[str, dict[str, Any]]],
    cluster: Cluster,
    ask: Ask,
) -> list[Way]:
    """Return up to three changes that would fit, the smallest first: one change each, if that is enough."""
    smaller = [way for way in _smaller(recipe, ds_name, ds_config, cluster, ask) if way.fits]
    found = smaller[:1]
    for name, config in configs:
        if config == ds_config:
            continue
        for way in _ways(recipe, name, config, cluster, ask):
            if way.fits:
                found.append(replace(way, says=(f"--ds {name}", *way.says)))
                break
        if len(found) >= 2:
            break
    for times in MORE_WORKERS:
        larger = _more(cluster, times)
        way = _way(recipe, ds_name, ds_config, larger, (f"{larger.num_workers} workers",), ask)
        if way.fits:
            found.append(way)
            break
    return [*found, *smaller[1:]][:3]


def _ways(recipe: Recipe, name: str, config: dict[str, Any], cluster: Cluster, ask: Ask) -> Iterator[Way]:
    yield _way(recipe, name, config, cluster, (), ask)
    yield from _smaller(recipe, name, config, cluster, ask)


def _smaller(recipe: Recipe, name: str, config: dict[str, Any], cluster: Cluster, ask: Ask) -> Iterator[Way]:
    """Ways that need less: half the micro-batch as often as it takes, and activations computed again."""
    may_recompute = any(stage.activation_checkpointing is not True for stage in recipe.stages)
    for recomputes in (False, True) if may_recompute else (False,):
        base = _recomputing(recipe) if recomputes else recipe
        said: tuple[str, ...] = ("activation_checkpointing: true",) if recomputes else ()
        if recomputes:
            yield _way(base, name, config, cluster, said, ask)
        for micro_batch in (8, 4, 2, 1):
            if all(_rows(stage, cluster) <= micro_batch for stage in base.stages):
                continue
            smaller = _with_micro_batch(base, micro_batch, cluster)
            yield _way(smaller, name, config, cluster, (*said, f"micro_batch: {micro_batch}"), ask)


def _way(
    recipe: Recipe, name: str, config: dict[str, Any], cluster: Cluster, says: tuple[str, ...], ask: Ask
) -> Way:
    return Way(
        ds_name=name,
        ds_config=config,
        recipe=recipe,
        cluster=cluster,
        says=says,
        forecasts=ask(recipe, name, config, cluster),
    )


def _rows(stage: Stage, cluster: Cluster) -> int:
    """Samples of a micro-batch, at most."""
    if isinstance(stage.micro_batch, int):
        return stage.micro_batch
    per_worker = ceil(stage.global_batch / cluster.num_workers) if isinstance(stage.global_batch, int) else 8
    return min(DEFAULT_MICRO_BATCH, per_worker)


def _recomputing(recipe: Recipe) -> Recipe:
    stages = [stage.model_copy(update={"activation_checkpointing": True}) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages})


def _with_micro_batch(recipe: Recipe, rows: int, cluster: Cluster) -> Recipe:
    stages = [
        stage.model_copy(update={"micro_batch": min(rows, _rows(stage, cluster))}) for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def _more(cluster: Cluster, times: int) -> Cluster:
    """A cluster with more workers: the node is filled up to eight first, then there are more nodes."""
    wanted = cluster.num_workers * times
    if cluster.num_nodes == 1 and wanted <= 8:
        host = cluster.host_bytes and cluster.host_bytes * times
        return replace(cluster, workers_per_node=wanted, host_bytes=host)
    return replace(cluster, num_nodes=cluster.num_nodes * times)
