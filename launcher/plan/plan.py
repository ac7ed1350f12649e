"""The plan: (what was asked, what there is) → what will be done. Pure: all ranks agree without talking."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import DataError, ModelError
from launcher.plan import zero
from launcher.plan.schedule import Schedule
from launcher.recipe import Recipe, Stage

DEFAULT_MICRO_BATCH = 8
DEFAULT_MAX_LENGTH = 512
DEFAULT_SAVE_MINUTES = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The workers that there are."""

    num_workers: int
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's files say without being loaded."""

    num_parameters: int | None = None
    hidden_size: int | None = None
    max_positions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """What is known of one split: counted from headers, or, once it is prepared, exactly."""

    num_rows: int
    num_samples: int
    exact: bool = False
    store: str = ""
    fingerprint: str = ""
    num_skipped: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """The splits of one stage."""

    train: SplitFacts
    eval: SplitFacts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage will do in one world."""

    name: str
    index: int
    starts_from: str | None
    is_baseline: bool
    num_samples: int
    num_positions: int
    samples_per_step: int
    micro_batch: int
    accumulation: int
    num_workers: int
    max_length: int
    schedule: Schedule
    ds: dict[str, Any]

    @property
    def chunks_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all workers."""
        return self.accumulation * self.num_workers

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    def positions(self, step: int) -> range:
        """The positions in the order that step `step` (from 1) trains on."""
        start = (step - 1) * self.samples_per_step
        return range(start, min(start + self.samples_per_step, self.num_positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do."""

    world: World
    model: ModelFacts
    dtype: Literal["fp32", "bf16", "fp16"]
    save_minutes: float | None
    stages: tuple[StagePlan, ...]


def make_plan(
    recipe: Recipe,
    ds_config: dict[str, Any],
    ds_name: str,
    model: ModelFacts,
    facts: tuple[StageFacts, ...],
    world: World,
) -> Plan:
    """Compute the plan of a run.

    Args:
        recipe: what was asked.
        ds_config: the DeepSpeed config as the user wrote it, checked.
        ds_name: the ds config's file, for messages.
        model: facts of the model that the first stage starts from.
        facts: facts of each stage's data, in the order of the recipe's stages.
        world: the workers that there are.

    Raises:
        DsConfigError: recipe and ds config contradict each other, or an "auto" cannot be decided.
        ModelError: a stage asks for more positions than the model has.
        DataError: a stage has nothing to train on.
    """
    dtype = _dtype(recipe, zero.given(ds_config), world)
    stages = [
        _stage_plan(recipe, i, ds_config, ds_name, model, facts[i], world, dtype)
        for i in range(len(recipe.stages))
    ]
    if recipe.baseline:
        last = len(recipe.stages) - 1
        stages.append(
            _stage_plan(recipe, last, ds_config, ds_name, model, facts[last], world, dtype, baseline=True)
        )
    checkpoint = recipe.checkpoint
    minutes = checkpoint.every_minutes
    if minutes is None and checkpoint.every_steps is None:
        minutes = DEFAULT_SAVE_MINUTES
    return Plan(world=world, model=model, dtype=dtype, save_minutes=minutes, stages=tuple(stages))


def max_length(stage: Stage, model: ModelFacts) -> int:
    """Return a stage's tokens per sample, checked against the model's positions."""
    if stage.max_length == "auto":
        return min(DEFAULT_MAX_LENGTH, model.max_positions or DEFAULT_MAX_LENGTH)
    if model.max_positions and stage.max_length > model.max_positions:
        raise ModelError(
            f"stages.{stage.name}.max_length is {stage.max_length}, but the model has"
            f" {model.max_positions} positions: lower max_length to at most {model.max_positions}"
        )
    return stage.max_length


def _stage_plan(
    recipe: Recipe,
    index: int,
    ds_config: dict[str, Any],
    ds_name: str,
    model: ModelFacts,
    facts: StageFacts,
    world: World,
    dtype: Literal["fp32", "bf16", "fp16"],
    *,
    baseline: bool = False,
) -> StagePlan:
    stage, given = recipe.stages[index], zero.given(ds_config)
    num_samples = facts.train.num_samples
    if num_samples == 0:
        raise DataError(f"stages.{stage.name}.data.train has no samples: {stage.data.train}")
    global_batch, micro_batch = _batches(stage, given, world)
    num_positions = stage.steps * global_batch if stage.steps else round(stage.epochs * num_samples)
    num_positions = max(1, num_positions)
    num_steps = math.ceil(num_positions / global_batch)
    accumulation = math.ceil(global_batch / (micro_batch * world.num_workers))
    schedule = Schedule(
        num_steps=num_steps,
        warmup_steps=round(stage.warmup * num_steps) if stage.warmup < 1 else round(stage.warmup),
        learning_rate=_winner(stage, "learning_rate", given.learning_rate),
        kind=stage.schedule,
        eval_every=stage.eval_every,
        save_every=recipe.checkpoint.every_steps,
    )
    asked = zero.Asked(
        micro_batch=micro_batch,
        accumulation=accumulation,
        num_workers=world.num_workers,
        global_batch=global_batch,
        learning_rate=schedule.learning_rate,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        gradient_clipping=stage.gradient_clipping,
        dtype=dtype,
        schedule=stage.schedule,
        warmup_steps=schedule.warmup_steps,
        num_steps=num_steps,
        hidden_size=model.hidden_size,
        device=world.device,
        written=_written(recipe, stage),
    )
    zero.contradictions(given, asked, ds_name, stage.name)
    is_first = baseline or index == 0
    return StagePlan(
        name="baseline" if baseline else stage.name,
        index=index,
        starts_from=None if is_first else recipe.stages[index - 1].name,
        is_baseline=baseline,
        num_samples=num_samples,
        num_positions=num_positions,
        samples_per_step=global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        num_workers=world.num_workers,
        max_length=max_length(stage, model),
        schedule=schedule,
        ds=zero.complete(ds_config, asked),
    )


def _batches(stage: Stage, given: zero.Given, world: World) -> tuple[int, int]:
    """Return (global batch, micro-batch): the ds config's numbers where they do not contradict."""
    global_batch: int = _winner(stage, "global_batch", given.train_batch_size)
    share = math.ceil(global_batch / world.num_workers)
    fallback = min(DEFAULT_MICRO_BATCH, share) if stage.micro_batch == "auto" else stage.micro_batch
    if given.micro_batch is not None and stage.micro_batch == "auto":
        fallback = given.micro_batch
    fixed_accumulation = given.accumulation is not None and given.train_batch_size is None
    if fixed_accumulation and "global_batch" not in stage.model_fields_set:
        global_batch = fallback * (given.accumulation or 1) * world.num_workers
    return global_batch, fallback


def _winner(stage: Stage, field: str, given: Any) -> Any:
    """A value of the ds config wins over a default of the recipe; over a wish it is a contradiction."""
    if given is None or field in stage.model_fields_set:
        return getattr(stage, field)
    return given


def _dtype(recipe: Recipe, given: zero.Given, world: World) -> Literal["fp32", "bf16", "fp16"]:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    fallback: Literal["fp32", "bf16"] = (
        "bf16" if world.device == "cuda" and "bf16" not in given.disabled else "fp32"
    )
    return given.dtype or fallback


def _written(recipe: Recipe, stage: Stage) -> frozenset[str]:
    written = set(stage.model_fields_set)
    if stage.micro_batch == "auto":
        written.discard("micro_batch")
    if recipe.model.dtype != "auto":
        written.add("dtype")
    return frozenset(written)
