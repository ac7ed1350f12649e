"""Before a run: what it needs on its cluster, whether it fits, and which ds config to take for `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import lean
from launcher import recipe as recipes
from launcher.errors import DoesNotFit, LauncherError, ModelError
from launcher.plan import choose, zero
from launcher.plan.cluster import Cluster
from launcher.plan.forecast import Forecast
from launcher.plan.plan import ModelFacts, StageFacts
from launcher.recipe import Recipe
from launcher.report import forecast as report

if TYPE_CHECKING:
    from launcher.forecasts import Forecaster

# The simplest first; those to a disk only where a user names one.
SHIPPED = ("zero1", "zero2", "zero3", "zero3_multinode", "zero2_offload", "zero3_offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a run before it begins.

    Attributes:
        recipe: as `recipe.dump` gives it; with what `auto` chose.
        ds_name, ds_config: as asked, or as `auto` chose.
        forecasts: of each stage.
        chosen: why `auto` chose so, in words.
        remedies: changes that would fit, in words; empty if it fits.
        unknown: why there is no forecast; empty if there is one.
    """

    recipe: dict[str, Any]
    ds_name: str
    ds_config: dict[str, Any]
    cluster: Cluster
    forecasts: tuple[Forecast, ...]
    chosen: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def fits(self) -> bool:
        """Whether all stages fit, as far as the machines are known."""
        return all(each.fits for each in self.forecasts)

    def lines(self) -> list[str]:
        """Return everything in words."""
        if self.unknown:
            return self.short()
        lines = [*self.chosen, *report.lines(self.forecasts, self.cluster)]
        return lines + [f"  would fit: {each}" for each in self.remedies]

    def short(self) -> list[str]:
        """Return what a run says at its begin: the choice, the verdict."""
        if self.unknown:
            return [f"no forecast of memory: {self.unknown}"]
        return [*self.chosen, report.verdict(self.forecasts, self.cluster)]

    def predicted(self) -> dict[str, dict[str, int | None]]:
        """Return by stage the bytes that each worker needs at the peak, on its `device` and in its `host`'s memory."""
        return {each.name: each.of_worker for each in self.forecasts}

    def token_flops(self) -> dict[str, tuple[float, float]]:
        """Return by stage `Forecast.token_flops`."""
        return {each.name: each.token_flops for each in self.forecasts}

    def tree(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "ds": self.ds_name,
            "unknown": self.unknown,
            "chosen": list(self.chosen),
            "remedies": list(self.remedies),
            **report.tree(self.forecasts, self.cluster),
        }

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            DoesNotFit: with what is missing and what would fit.
        """
        if self.fits:
            return
        what = report.verdict(self.forecasts, self.cluster).removeprefix("verdict: ")
        would = "; ".join(self.remedies) or "nothing near would: a smaller model or larger machines"
        raise DoesNotFit(f"{what}. Would fit: {would}. (--no-fit-check starts all the same)")


def shipped(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the ds configs that `auto` chooses from, by their paths.

    Args:
        folder: ds_configs/.
    """
    paths = [folder / f"{name}.json" for name in SHIPPED]
    return [(str(path), zero.load(str(path))) for path in paths if path.exists()]


# What a trace comes to need, but for the model's own code.
_OF_A_TRACE = (
    "launcher.assembly",
    "launcher.train.recompute",
    "launcher.train.trace",
    "transformers.modeling_layers",
)


def look(
    recipe_tree: dict[str, Any],
    ds_name: str,
    ds_config: dict[str, Any] | None,
    configs: list[tuple[str, dict[str, Any]]],
    model_facts: ModelFacts,
    facts: tuple[StageFacts, ...],
    cluster: Cluster,
) -> Outlook | LauncherError:
    """Forecast a run. Errors come back as values, so that they cross process borders unchanged.

    Args:
        recipe_tree: as `recipe.dump` gives it.
        ds_name: the ds config's file, or `auto`.
        ds_config: its content; None for `auto`.
        configs: what `auto` chooses from, and what is offered where it does not fit.
        model_facts: of the first model.
        facts: of each stage's data.
        cluster: the machines.
    """
    with lean.imports():
        # Not in the driver's process, which knows outlooks too.
        from launcher.forecasts import Forecaster

        lean.load(_OF_A_TRACE)
    recipe, ask = recipes.parse(recipe_tree), Forecaster(model_facts, facts)
    configs = [each for each in configs if cluster.num_nodes > 1 or "multinode" not in each[0]]
    if recipe.model.compile:
        configs = [each for each in configs if zero.zero_stage(each[1]) < 3]
    try:
        if ds_config is None:
            return _choose(recipe, configs, cluster, ask)
        forecasts = ask(recipe, ds_name, ds_config, cluster)
        fits = all(each.fits for each in forecasts)
        near = [] if fits else choose.nearest(recipe, ds_name, ds_config, configs, cluster, ask)
        return Outlook(
            recipe=recipe_tree,
            ds_name=ds_name,
            ds_config=ds_config,
            cluster=cluster,
            forecasts=forecasts,
            remedies=tuple(report.way_line(way) for way in near),
        )
    except LauncherError as error:
        return error
    except Exception as error:
        # Of a model's own code, which the meta device may not suit: no reason not to train.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if ds_config is None:
            return ModelError(f"--ds auto: the model cannot be traced ({reason}): name a ds config")
        return Outlook(
            recipe=recipe_tree,
            ds_name=ds_name,
            ds_config=ds_config,
            cluster=cluster,
            forecasts=(),
            unknown=reason,
        )


def _choose(
    recipe: Recipe, configs: list[tuple[str, dict[str, Any]]], cluster: Cluster, ask: Forecaster
) -> Outlook:
    best, seen = choose.cheapest(recipe, configs, cluster, ask)
    way = best or seen[-1]
    near = [] if best else choose.nearest(recipe, way.ds_name, way.ds_config, configs, cluster, ask)
    changes = f" with {', '.join(way.says)}" if way.says else ""
    chosen = [f"--ds auto takes {Path(way.ds_name).name}{changes}: the quickest that fits, of:"]
    if best is None:
        chosen = ["--ds auto: none of the shipped configs fits:"]
    for each in seen:
        fit = "" if each.fits else "does not fit: "
        chosen.append(f"  {Path(each.ds_name).name:<22} {fit}{report.way_line(each)}")
    return Outlook(
        recipe=recipes.dump(way.recipe),
        ds_name=way.ds_name,
        ds_config=way.ds_config,
        cluster=cluster,
        forecasts=way.forecasts,
        chosen=tuple(chosen),
        remedies=tuple(report.way_line(each) for each in near),
    )
