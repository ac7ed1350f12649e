"""From a stage's plan to what DeepSpeed trains: tokenizer, tasks, models on one trunk, groups, engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.part import Part, Seat, is_same_head
from launcher.plan.plan import Plan, StagePlan
from launcher.pulse import Pulse
from launcher.recipe import Recipe, Stage
from launcher.report.record import Recorder
from launcher.tasks import base

if TYPE_CHECKING:
    from launcher.facts import Prepared
    from launcher.train.trainable import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one rank holds between stages.

    Attributes:
        wish: returns why the driver wants the workers to save and leave, on rank 0; empty: it does not.
        pulse: where this rank is, for its heartbeats.
        token_flops: by stage, as of `plan.forecast.Forecast`, where it is known.
    """

    recipe: Recipe
    plan: Plan
    prepared: "Prepared"
    run_dir: Path
    rank: int
    device: torch.device
    recorder: Recorder
    samples: Recorder | None
    wish: Callable[[], str] = str
    pulse: Pulse = field(default_factory=Pulse)
    token_flops: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def stage_dir(self, name: str) -> Path:
        """Where a stage keeps its checkpoints and its export."""
        return self.run_dir / "stages" / name

    def export_of(self, name: str) -> str:
        """The model that a stage ended with."""
        return str(self.stage_dir(name) / "export")

    def start_directory(self, plan: StagePlan) -> str:
        """The model that a stage starts with."""
        if plan.starts_from is None:
            return str(self.prepared.model_directory)
        return self.export_of(plan.starts_from)


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a stage runs on."""

    parts: list[Part]
    engine: Any
    tokenizer: Any


def assemble(context: Context, plan: StagePlan) -> Assembly:
    """Build what a stage trains; every rank must call it."""
    from launcher.train import model as models

    tokenizer = models.load_tokenizer(context.recipe.model)
    parts = [_part(context, each, tokenizer) for each in (*plan.beside, plan)]
    start = context.start_directory(plan)
    origin = start if plan.starts_from else None
    main = parts[-1]
    own = _built(context, main, start, origin, main.plan.head_start)
    built = [
        own
        if part is main or _shares_all(part, main)
        else _built(context, part, start, origin, part.plan.head_start)
        for part in parts
    ]
    return Assembly(parts, _engine(context, plan, parts, built), tokenizer)


def reassemble(context: Context, plan: StagePlan, trunk: str) -> Assembly:
    """Build an earlier stage again for evaluation: its own head, on the trunk that training ended with.

    Args:
        context: of this rank.
        plan: of the earlier stage.
        trunk: the export whose trunk it gets.
    """
    from launcher.train import model as models

    tokenizer = models.load_tokenizer(context.recipe.model)
    part = _part(context, plan, tokenizer)
    built = _built(context, part, trunk, context.export_of(plan.name), "keep")
    return Assembly([part], _engine(context, plan, [part], [built]), tokenizer)


@dataclass(frozen=True, slots=True)
class _Built:
    """A part's model, its task's parameters beside it, and the names of those drawn at random."""

    model: Any
    extra: Any
    drawn: list[str]


def _part(context: Context, plan: StagePlan, tokenizer: Any) -> Part:
    seat = Seat(context.rank // plan.team, plan.num_teams, base.padding_id(tokenizer))
    stage, facts = context.recipe.stages[plan.index], context.prepared.facts[plan.index]
    return Part(stage, plan, facts, tokenizer, seat)


def _built(context: Context, part: Part, start: str, origin: str | None, kind: str) -> _Built:
    """Load a part's model, and what its task has beside it.

    Args:
        context: of this rank.
        part: the part.
        start: the directory of the weights.
        origin: the export whose head counts; None: there is none but what the weights themselves have.
        kind: what the head starts from: `new`, `keep` or `match`.
    """
    from launcher.train import model as models
    from launcher.train import ops

    # Parameters that are kept on disks are moved there as they are loaded, by such an op.
    ops.forget_killed_builds(part.plan.ds)
    labels = part.facts.train.labels
    extra = part.task.extra(labels)
    if extra is not None and origin is not None and kind != "new":
        part.task.start_extra(extra, Path(origin), labels)
    options = part.task.model_options(labels)
    if not options:
        kind, origin = "keep", None  # The head belongs to the model, as in language models.
    is_own = kind == "keep" and origin in (None, start)
    loaded, drawn = models.load(
        context.recipe.model,
        start,
        part.task.auto_model,
        options=options | {"pad_token_id": part.seat.pad_token_id},
        head=models.HeadStart(
            kind=kind,
            directory=None if is_own else origin or start,
            seed=part.asked.seed,
            stage=part.asked.name,
        ),
        dtype=context.plan.dtype,
        ds=part.plan.ds,
    )
    return _Built(loaded, extra, drawn)


def _engine(context: Context, plan: StagePlan, parts: list[Part], built: list[_Built]) -> Any:
    from launcher.train import compiled, engine, recompute
    from launcher.train.parts import Parts, share_trunk

    context.pulse.phase = "build"
    models, extras = [each.model for each in built], [each.extra for each in built]
    share_trunk(models)
    stages = [part.asked for part in parts]
    groups = trained_groups(models, extras, stages, [each.drawn for each in built])
    if plan.recomputes:
        for model in models:
            recompute.turn_on(model, keeps_products=plan.keeps_products)
            if plan.mlp_tile is not None:
                recompute.tile(model, plan.mlp_tile)
    if context.recipe.model.compile:
        for model in models:
            compiled.turn_on(model)
    return engine.Engine(
        Parts([part.task for part in parts], models, extras),
        groups,
        plan,
        weights=[part.asked.weight if len(parts) > 1 else 1.0 for part in parts],
        seed=parts[-1].asked.seed,
        device=context.device,
    )


def trained_groups(
    models: Sequence[Any], extras: Sequence[Any], stages: Sequence[Stage], drawn: Sequence[Sequence[str]]
) -> "list[Group]":
    """Freeze and adapt the models of parts as their stages ask; return what is left to train, in groups.

    To be called when they share a trunk: what any stage freezes of it does not move.

    Args:
        models: of each part.
        extras: their tasks' parameters beside them.
        stages: as asked.
        drawn: names of the parameters of each that begin at random.
    """
    from launcher.train import adapters, trainable

    for model, stage in zip(models, stages, strict=True):
        trainable.freeze(model, stage)
    for model, stage, names in zip(models, stages, drawn, strict=True):
        if stage.trainable.lora is not None and not adapters.is_adapted(model):
            adapters.add(model, stage, names)
    each = zip(models, extras, stages, strict=True)
    return trainable.merged([group for parts in each for group in trainable.groups(*parts)])


def _shares_all(part: Part, main: Part) -> bool:
    mine, others = (each.task.model_options(each.facts.train.labels) for each in (part, main))
    return is_same_head(part.asked, mine, main.asked, others)


def write_export(context: Context, part: Part, index: int, built: Assembly) -> None:
    """Export a part's model, with a probe to verify it by; every rank must call it."""
    from launcher.train import adapters, export
    from launcher.train.model import DTYPES, gathered

    context.pulse.phase = "export"
    folder, dtype = context.stage_dir(part.name), DTYPES[context.plan.dtype]
    probe = part.probe_batch()
    logits = built.engine.logits(index, probe)
    model, extra = built.engine.model(index), built.engine.parts.extra(index)
    export.write(model, built.tokenizer, folder / "export", dtype)
    lora = part.asked.trainable.lora
    if lora is not None and lora.export == "adapter" and adapters.is_adapted(model):
        base = context.start_directory(part.plan)
        export.write_adapter(model, part.asked, base, folder / "adapter", dtype)
    if extra is not None:
        with gathered(list(extra.parameters())):
            if context.rank == 0:
                part.task.save_extra(extra, folder / "export")
        dist.barrier()
    if context.rank == 0:
        export.write_probe(folder / export.PROBE, probe.features, logits)
    context.recorder.write("export", stage=part.name, path=str(folder / "export"))
