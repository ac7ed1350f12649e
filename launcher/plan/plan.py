"""The plan: (what was asked, what there is) → what will be done. Pure: all ranks agree without talking."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.errors import DataError, DsConfigError, ModelError
from launcher.plan import sequence, zero
from launcher.plan.schedule import Schedule
from launcher.recipe import Recipe, Stage, in_tokens

DEFAULT_MICRO_BATCH = 8
DEFAULT_MAX_LENGTH = 512
DEFAULT_SAVE_MINUTES = 15.0
# Fewer steps in an epoch make fewer than four pools: sorted by length, each would be the same every time.
FEWEST_STEPS_TO_BUCKET = 64
# `epochs: auto`: few samples are seen often, or a head does not settle; a language model learns them by heart.
STEPS_WANTED, MOST_EPOCHS, MOST_EPOCHS_OF_LM = 200, 20, 3
WARMUP_OF_FEW = 0.1
_LANGUAGE = ("causal-lm", "translation")

Kind = Literal["random", "bucketed", "packed"]
HeadStart = Literal["new", "keep", "match"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The workers that there are.

    Attributes:
        half: the 16-bit precision that their GPUs have in hardware.
    """

    num_workers: int
    device: Literal["cpu", "cuda"]
    half: Literal["bf16", "fp16"] = "bf16"

    @property
    def kind(self) -> str:
        """The resource, as Ray calls it, of which each worker takes one."""
        return "GPU" if self.device == "cuda" else "CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's files say without being loaded."""

    num_parameters: int | None = None
    hidden_size: int | None = None
    max_positions: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """What is known of one split.

    Attributes:
        about_rows: from headers, or an estimate; known before anything is prepared, and never changed.
        num_samples: places in the order of one epoch: rows, or samples where rows and samples differ.
        is_settled: whether `num_samples` is final.
        is_whole: whether all is prepared, so that all counts are exact.
        stores: the token store of each data set.
        weights: the share of each data set, relative to the others.
        fingerprint: of all data sets: what the order is keyed by.
        num_packs: packs of up to `max_length` tokens, where the task packs.
        num_cut: samples that lost tokens to `max_length`; `num_cut_tokens` is how many.
    """

    about_rows: int
    num_samples: int
    is_settled: bool = False
    is_whole: bool = False
    stores: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    fingerprint: str = ""
    num_skipped: int = 0
    num_bad: int = 0
    num_cut: int = 0
    num_cut_tokens: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_packs: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """The splits of one stage."""

    train: SplitFacts
    eval: SplitFacts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage will do in one world.

    Attributes:
        starts_from: the stage whose model it starts with; None: the recipe's model.
        beside: stages trained in the same steps, on the same trunk; of their schedules nothing counts.
        accumulation: micro-batches of a step for each team.
        team: workers that share each sample (sequence parallelism); a micro-batch is a team's.
        recomputes: whether activations are computed again in the backward.
        keeps_products: whether those of matrix products and attention are kept all the same.
        mlp_tile: tokens that a feed-forward network takes at once; None: a whole micro-batch.
    """

    name: str
    index: int
    starts_from: str | None
    is_baseline: bool
    head_start: HeadStart
    beside: tuple["StagePlan", ...] = ()
    kind: Kind
    num_units: int
    units_per_step: int
    micro_batch: int
    budget_tokens: int | None
    accumulation: int
    num_workers: int
    team: int = 1
    max_length: int
    recomputes: bool
    keeps_products: bool
    mlp_tile: int | None = None
    schedule: Schedule
    ds: dict[str, Any]

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def num_teams(self) -> int:
        """How many samples are worked on at a time, at least."""
        return self.num_workers // self.team

    @property
    def share_length(self) -> int:
        """The most tokens of a sample that one worker has."""
        return -(-self.max_length // self.team)

    @property
    def unit(self) -> str:
        """What a step is counted in."""
        return "packs" if self.kind == "packed" else "samples"

    @property
    def can_halve(self) -> bool:
        """Whether its micro-batch can be smaller."""
        tokens = self.budget_tokens is not None and self.budget_tokens > self.max_length
        return tokens or self.micro_batch > 1 or any(each.can_halve for each in self.beside)

    def halved(self, times: int) -> "StagePlan":
        """Return the plan with its micro-batch halved so often, and as much more accumulation."""
        if not times:
            return self
        micro_batch, budget = max(1, self.micro_batch >> times), self.budget_tokens
        accumulation = math.ceil(self.units_per_step / (micro_batch * (self.num_workers // self.team)))
        product = self.ds["train_batch_size"] // (self.micro_batch * self.accumulation)
        return replace(
            self,
            beside=tuple(each.halved(times) for each in self.beside),
            micro_batch=micro_batch,
            budget_tokens=None if budget is None else max(self.max_length, budget >> times),
            accumulation=accumulation,
            ds=self.ds
            | {
                "train_batch_size": micro_batch * accumulation * product,
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
            },
        )


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
    halvings: Mapping[str, int] | None = None,
) -> Plan:
    """Compute the plan of a run.

    Args:
        recipe: what was asked.
        ds_config: the DeepSpeed config as the user wrote it, checked.
        ds_name: the ds config's file, for messages.
        model: facts of the model that the first stage starts from.
        facts: facts of each stage's data, in the order of the recipe's stages.
        world: the workers that there are.
        halvings: by stage, how often its micro-batch was halved for want of memory.

    Raises:
        DsConfigError: recipe and ds config contradict each other, or an "auto" cannot be decided.
        ModelError: a stage asks for more positions than the model has.
        DataError: a stage has nothing to train on.
    """
    dtype = _dtype(recipe, zero.given(ds_config), world)
    if recipe.model.compile and zero.zero_stage(ds_config) == 3:
        raise DsConfigError(
            f"model.compile gains nothing under ZeRO-3 ({ds_name}), which comes between all layers to gather their"
            " weights: leave it out, or take a ds config of stage 0 to 2"
        )

    def plan_of(index: int, starts_from: str | None, *, baseline: bool = False) -> StagePlan:
        return _stage_plan(
            recipe, index, ds_config, ds_name, model, facts, world, dtype, starts_from, baseline=baseline
        )

    last = len(recipe.stages) - 1
    if recipe.transfer == "joint":
        stages = [replace(plan_of(last, None), beside=tuple(plan_of(i, None) for i in range(last)))]
    else:
        names = [None, *(stage.name for stage in recipe.stages)]
        stages = [plan_of(i, names[i]) for i in range(last + 1)]
    if recipe.baseline:
        stages.append(plan_of(last, None, baseline=True))
    stages = [stage.halved((halvings or {}).get(stage.name, 0)) for stage in stages]
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
    facts: tuple[StageFacts, ...],
    world: World,
    dtype: Literal["fp32", "bf16", "fp16"],
    starts_from: str | None,
    *,
    baseline: bool,
) -> StagePlan:
    stage, given = recipe.stages[index], zero.given(ds_config)
    train, longest = facts[index].train, max_length(stage, model)
    if train.num_samples == 0 and (train.is_whole or train.is_settled):
        paths = [data_set.path for data_set in stage.data.train]
        raise DataError(f"stages.{stage.name}.data.train has no samples: {paths}")
    team = sequence.team(given.team, recipe, stage, model, world, longest, ds_name)
    num_teams, kind = world.num_workers // team, batching(stage, train, given, world)
    units_per_step, micro_batch, budget_tokens = _batches(stage, train, given, num_teams, kind, longest)
    num_units = _num_units(train, kind, longest)
    epochs = _epochs(stage, num_units, units_per_step)
    num_steps = stage.steps or _steps_of_epochs(epochs, num_units, units_per_step)
    accumulation = math.ceil(units_per_step / (micro_batch * num_teams))
    schedule = Schedule(
        num_steps=num_steps,
        warmup_steps=_warmup(stage, epochs, num_steps),
        learning_rate=_winner(stage, "learning_rate", given.learning_rate),
        kind=stage.schedule,
        eval_every=stage.eval_every,
        save_every=recipe.checkpoint.every_steps,
    )
    asked = zero.Asked(
        micro_batch=micro_batch,
        accumulation=accumulation,
        num_workers=world.num_workers,
        team=team,
        global_batch=units_per_step,
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
    recomputes = stage.activation_checkpointing in (True, "selective")
    keeps_products = stage.activation_checkpointing == "selective"
    return StagePlan(
        name="baseline" if baseline else stage.name,
        index=index,
        starts_from=starts_from,
        is_baseline=baseline,
        head_start=_head_start(recipe, index, facts, is_first=starts_from is None),
        kind=kind,
        num_units=num_units,
        units_per_step=units_per_step,
        micro_batch=micro_batch,
        budget_tokens=budget_tokens,
        accumulation=accumulation,
        num_workers=world.num_workers,
        team=team,
        max_length=longest,
        recomputes=recomputes,
        keeps_products=keeps_products,
        mlp_tile=sequence.mlp_tile(
            micro_batch, -(-longest // team), recomputes=recomputes and not keeps_products
        ),
        schedule=schedule,
        ds=zero.complete(ds_config, asked),
    )


def batching(stage: Stage, train: SplitFacts, given: zero.Given, world: World) -> Kind:
    """Return how samples become batches. See `batching` in the recipe."""
    if stage.batching != "auto":
        return stage.batching
    wanted = _winner(stage, "global_batch", given.train_batch_size)
    tokens = in_tokens(wanted)
    # Packs want attention that skips other samples, which CPUs lack: there, batches of like length
    # without a mask were 8 % faster than packs with one.
    if tokens and stage.task == "causal-lm" and world.device == "cuda":
        return "packed"
    samples_per_step = wanted if tokens is None else _samples_in(tokens, train)
    return "bucketed" if train.about_rows / samples_per_step >= FEWEST_STEPS_TO_BUCKET else "random"


def _batches(
    stage: Stage, train: SplitFacts, given: zero.Given, num_teams: int, kind: Kind, longest: int
) -> tuple[int, int, int | None]:
    """Return (units of a step, units of a micro-batch, its padded tokens at most).

    The ds config's numbers count where they do not contradict.
    """
    wanted = _winner(stage, "global_batch", given.train_batch_size)
    tokens = in_tokens(wanted)
    if tokens is None:
        per_step: int = wanted
    else:
        per_step = max(1, tokens // longest) if kind == "packed" else _samples_in(tokens, train)
    micro_tokens = in_tokens(stage.micro_batch)
    if isinstance(stage.micro_batch, int):
        micro_batch, budget = stage.micro_batch, None
    elif micro_tokens is not None:
        micro_batch, budget = max(1, micro_tokens // longest), micro_tokens
    elif given.micro_batch is not None:
        micro_batch, budget = given.micro_batch, None
    else:
        micro_batch = min(DEFAULT_MICRO_BATCH, math.ceil(per_step / num_teams))
        budget = DEFAULT_MICRO_BATCH * longest
    fixed_accumulation = given.accumulation is not None and given.train_batch_size is None
    if fixed_accumulation and "global_batch" not in stage.model_fields_set:
        per_step = micro_batch * (given.accumulation or 1) * num_teams
    return per_step, micro_batch, budget


def _samples_in(tokens: int, train: SplitFacts) -> int:
    """Return how many samples have so many tokens on average."""
    return max(1, round(tokens * train.num_samples / max(1, train.num_tokens)))


def _num_units(train: SplitFacts, kind: Kind, longest: int) -> int:
    if kind != "packed":
        return train.num_samples
    return train.num_packs if train.is_whole else math.ceil(train.num_tokens / longest)


def _epochs(stage: Stage, num_units: int, units_per_step: int) -> float:
    if stage.epochs != "auto":
        return stage.epochs
    wanted = math.ceil(STEPS_WANTED / max(1, math.ceil(num_units / units_per_step)))
    return float(min(wanted, MOST_EPOCHS_OF_LM if stage.task in _LANGUAGE else MOST_EPOCHS))


def _warmup(stage: Stage, epochs: float, num_steps: int) -> int:
    if stage.warmup == "auto":
        is_of_few = stage.epochs == "auto" and stage.steps is None and epochs > 1
        return round(WARMUP_OF_FEW * num_steps) if is_of_few else 0
    return round(stage.warmup * num_steps) if stage.warmup < 1 else round(stage.warmup)


def _head_start(recipe: Recipe, index: int, facts: tuple[StageFacts, ...], *, is_first: bool) -> HeadStart:
    """Return what a stage's head starts from. See `start` in the recipe's head."""
    stage = recipe.stages[index]
    if is_first and index > 0:
        return "new"  # What the recipe says is about the stage before, which is left out.
    if stage.head.start != "auto":
        return stage.head.start
    if is_first:
        return "new"
    before = recipe.stages[index - 1]
    is_alike = (before.task, before.head.kind, before.data.label_type) == (
        stage.task,
        stage.head.kind,
        stage.data.label_type,
    )
    return "keep" if is_alike and facts[index - 1].train.labels == facts[index].train.labels else "new"


def _steps_of_epochs(epochs: float, num_units: int, units_per_step: int) -> int:
    """Each whole epoch ends with a step of its own, smaller where the batch does not divide."""
    whole = math.floor(epochs)
    rest = math.ceil(round((epochs - whole) * num_units, 6) / units_per_step)
    return max(1, whole * math.ceil(num_units / units_per_step) + rest)


def _winner(stage: Stage, field: str, given: Any) -> Any:
    """A value of the ds config wins over a default of the recipe; over a wish it is a contradiction."""
    if given is None or field in stage.model_fields_set:
        return getattr(stage, field)
    return given


def _dtype(recipe: Recipe, given: zero.Given, world: World) -> Literal["fp32", "bf16", "fp16"]:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    is_half = world.device == "cuda" and world.half not in given.disabled
    return given.dtype or (world.half if is_half else "fp32")


def _written(recipe: Recipe, stage: Stage) -> frozenset[str]:
    written = set(stage.model_fields_set)
    if stage.micro_batch == "auto":
        written.discard("micro_batch")
    if recipe.model.dtype != "auto":
        written.add("dtype")
    return frozenset(written)
