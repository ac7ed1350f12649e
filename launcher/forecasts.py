"""Forecasts of a recipe: each stage is traced once, then any ds config and cluster is arithmetic."""

from collections.abc import Mapping
from typing import Any

from launcher import footprint
from launcher.plan import forecast
from launcher.plan.cluster import Cluster
from launcher.plan.forecast import Forecast
from launcher.plan.plan import ModelFacts, StageFacts, make_plan
from launcher.plan.shapes import Shapes
from launcher.recipe import Recipe


class Forecaster:
    """Answers what a recipe needs with a ds config on a cluster."""

    def __init__(self, model_facts: ModelFacts, facts: tuple[StageFacts, ...]) -> None:
        """Begin.

        Args:
            model_facts: of the first model.
            facts: of each stage's data.
        """
        self.model_facts, self.facts = model_facts, facts
        self._known: dict[tuple[Any, ...], Shapes] = {}

    def __call__(
        self, recipe: Recipe, ds_name: str, ds_config: Mapping[str, Any], cluster: Cluster
    ) -> tuple[Forecast, ...]:
        """Return the forecast of each stage.

        Raises:
            BadInput: recipe and ds config contradict each other, or the model cannot be built.
        """
        world = cluster.world
        plan = make_plan(recipe, dict(ds_config), ds_name, self.model_facts, self.facts, world)
        result = []
        for stage in plan.stages:
            # By what is trained, not by name: the baseline is the last stage once more.
            # A loss in tiles is not in proportion to the rows, so each micro-batch has a trace of its own.
            rows = stage.micro_batch if recipe.stages[stage.index].task == "causal-lm" else None
            partitioned = footprint.is_partitioned(recipe, stage)
            how = (stage.team, rows, partitioned, stage.keeps_products)
            key = (stage.index, len(stage.beside), plan.dtype, world.device, *how)
            if key not in self._known:
                self._known[key] = footprint.of_stage(
                    recipe, stage, self.facts, dtype=plan.dtype, device=world.device
                )
            result.append(forecast.of_stage(stage, self._known[key], cluster, plan.dtype))
        return tuple(result)
