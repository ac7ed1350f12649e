"""What a stage's model and micro-batch take, found on the meta device: no weights, no data, no GPU."""

from __future__ import annotations

from typing import Any

import torch

from launcher import tasks
from launcher.errors import LauncherError, ModelError
from launcher.part import is_same_head
from launcher.plan import sequence
from launcher.plan.plan import StageFacts, StagePlan
from launcher.plan.shapes import Parameter, Shapes, Trace, deeper
from launcher.recipe import Recipe

# Models with more layers than DEEP are traced with FEW.
DEEP, FEW = 8, (2, 4)
# What a head has for labels where nothing tells them yet: few or many, it is small beside the trunk.
SOME_LABELS = tuple(f"L{i}" for i in range(8))


def of_stage(
    recipe: Recipe, plan: StagePlan, facts: tuple[StageFacts, ...], *, dtype: str, device: str
) -> Shapes:
    """Return the parameters of a stage, and what one of its micro-batches takes.

    Args:
        recipe: what was asked.
        plan: of the stage.
        facts: of each stage's data, for the labels where they are known.
        dtype: fp32, bf16 or fp16.
        device: `cuda` or `cpu`: their attention kernels hold different things.

    Raises:
        ModelError: the model cannot be built from its config, or its samples cannot be divided as planned.
    """
    from launcher.train import model as models
    from launcher.train import sequence as teams
    from launcher.train import trace

    tokenizer = models.load_tokenizer(recipe.model) if _needs_tokenizer(recipe) else None
    vocabulary = len(tokenizer) if tokenizer is not None else 0

    def skeleton(layers: int | None = None) -> _Skeleton:
        return _Skeleton(recipe, plan, facts, vocabulary, models.DTYPES[dtype], layers, device)

    work = trace.register_attention(
        device, recipe.model.attention, plan.team, is_packed=plan.kind == "packed"
    )
    whole = skeleton()
    if plan.team > 1:
        # As each rank will, but before there are any.
        for model in whole.models:
            teams.check(model, plan.team)
    depth = whole.depth()
    if depth is None or depth <= DEEP:
        return whole.shapes(*whole.traces(work))
    # A deep model's layers are alike, so the rest follows from a few.
    (few, few_again), (more, more_again) = (skeleton(layers).traces(work) for layers in FEW)
    times = (depth - FEW[1]) / (FEW[1] - FEW[0])
    again = deeper(few_again, more_again, times) if few_again and more_again else None
    return whole.shapes(deeper(few, more, times), again)


def is_partitioned(recipe: Recipe, plan: StagePlan) -> bool:
    """Return whether a stage's trace is another one because it runs under ZeRO-3: where weights are frozen.

    Args:
        recipe: what was asked.
        plan: of the stage.
    """
    asked = [recipe.stages[each.index].trainable for each in (*plan.beside, plan)]
    is_frozen = any(each.lora or each.freeze or each.last_layers is not None for each in asked)
    return is_frozen and (plan.ds.get("zero_optimization") or {}).get("stage") == 3


class _Skeleton:
    """A stage's parts on the meta device, as they will be trained."""

    def __init__(
        self,
        recipe: Recipe,
        plan: StagePlan,
        facts: tuple[StageFacts, ...],
        vocabulary: int,
        dtype: torch.dtype,
        layers: int | None,
        device: str,
    ) -> None:
        from launcher.train.parts import Parts, share_trunk

        self.recipe, self.plans, self.layers = recipe, [*plan.beside, plan], layers
        self.stages = [recipe.stages[each.index] for each in self.plans]
        self.labels = [
            _labels(stage, facts[each.index]) for stage, each in zip(self.stages, self.plans, strict=True)
        ]
        self.tasks = [tasks.create(stage) for stage in self.stages]
        for task in self.tasks:
            task.traced_for = device
        main = self._model(len(self.plans) - 1, vocabulary, dtype)
        self.models = [
            main if self._shares_all(i) else self._model(i, vocabulary, dtype)
            for i in range(len(self.plans) - 1)
        ]
        self.models.append(main)
        share_trunk(self.models)
        with torch.device("meta"):
            extras = [task.extra(labels) for task, labels in zip(self.tasks, self.labels, strict=True)]
        self.parts = Parts(self.tasks, self.models, extras).to(dtype=dtype).train()
        self.groups = self._groups(extras)

    def _shares_all(self, index: int) -> bool:
        """Whether a part is trained on the main one's model."""
        mine, main = (self.tasks[i].model_options(self.labels[i]) for i in (index, -1))
        return is_same_head(self.stages[index], mine, self.stages[-1], main)

    def _model(self, index: int, vocabulary: int, dtype: torch.dtype) -> Any:
        import transformers

        from launcher.train import model as models
        from launcher.train import trace

        task, asked = self.tasks[index], self.recipe.model
        config = models.config_of(asked, vocabulary)
        # A model without weights of its own is saved in torch's default dtype first (models.initialise).
        self.is_converted = (getattr(config, "dtype", None) or torch.float32) != dtype
        task.check_config(config)
        for name, value in task.model_options(self.labels[index]).items():
            setattr(config, name, value)
        if self.layers is not None:
            _set_layers(config, self.layers)
        attention = "eager" if asked.attention == "eager" else trace.ATTENTION
        try:
            with torch.device("meta"):
                built = getattr(transformers, task.auto_model).from_config(
                    config,
                    attn_implementation=attention,
                    trust_remote_code=asked.trust_remote_code is not None,
                    dtype=dtype,
                )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"model: cannot be built from its config: {reason}") from None
        built.config.use_cache = False
        if asked.add_tokens and vocabulary > built.get_input_embeddings().num_embeddings:
            with torch.device("meta"):
                built.resize_token_embeddings(vocabulary, mean_resizing=False)
        return built

    def _groups(self, extras: list[Any]) -> dict[int, int]:
        """Return by id the optimizer group of each parameter that is trained."""
        from launcher.assembly import trained_groups

        with torch.device("meta"):
            groups = trained_groups(self.models, extras, self.stages, [()] * len(self.models))
        return {id(p): i for i, group in enumerate(groups) for p in group.parameters}

    def depth(self) -> int | None:
        """Return the number of layers; None if they are not all alike, or not all trained alike."""
        kinds = {kind for model in self.models for kind in getattr(model.config, "layer_types", None) or ()}
        is_even = all(
            stage.trainable.last_layers is None and not stage.trainable.freeze for stage in self.stages
        )
        if not is_even or len(kinds) > 1 or getattr(self.models[0].config, "first_k_dense_replace", None):
            return None
        depths = {getattr(model.config, name, None) for model in self.models for name in _DEPTHS} - {None}
        return depths.pop() if len(depths) == 1 else None

    def traces(self, work: list[int]) -> tuple[Trace, Trace | None]:
        """Run the micro-batch of the stage as it is, and with activations computed again, if that is possible."""
        from launcher.train import recompute

        plain = self.trace(work)
        try:
            for model in self.models:
                recompute.turn_on(model, keeps_products=self.plans[-1].keeps_products)
                if (tile := self._tile()) is not None:
                    recompute.tile(model, tile)
        except LauncherError:
            return plain, None
        return plain, self.trace(work)

    def _tile(self) -> int | None:
        """Tokens of a tile, if activations are computed again."""
        return sequence.mlp_tile(*_size(self.plans[-1]), recomputes=not self.plans[-1].keeps_products)

    def trace(self, work: list[int]) -> Trace:
        """Run the micro-batch of the stage once."""
        from launcher.train import trace

        batches = [self._batch(i) for i in range(len(self.plans))]
        main = self.plans[-1]
        rows, length = _size(main)
        return trace.run(
            self.parts,
            batches,
            lambda outputs: self._loss(outputs, batches),
            rows=rows,
            length=length,
            attention_work=work,
            is_partitioned=is_partitioned(self.recipe, main),
        )

    def _batch(self, index: int) -> dict[str, torch.Tensor]:
        rows, length = _size(self.plans[index])
        shapes = self.tasks[index].example(rows, length, len(self.labels[index]))
        return {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}

    def _loss(self, outputs: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        total = torch.zeros((), device="meta")
        for task, output, batch in zip(self.tasks, outputs, batches, strict=True):
            # A CRF looks at its labels, which the meta device does not have; beside the trunk it is small.
            total = total + (output[0].sum() if isinstance(output, tuple) else task.loss(output, batch))
        return total

    def shapes(self, plain: Trace, checkpointed: Trace | None) -> Shapes:
        """Return what was found."""
        parameters = list(self.parts.named_parameters())
        numbers = {id(parameter): i for i, (_, parameter) in enumerate(parameters)}
        # Modules run in the order in which they were made, or nearly so; mere lists of them do not run.
        visits = (
            tuple(numbers[id(p)] for p in each.parameters(recurse=False))
            for each in self.parts.modules()
            if not isinstance(each, torch.nn.ModuleList | torch.nn.ModuleDict)
        )
        return Shapes(
            parameters=tuple(
                Parameter(name, p.numel(), self.groups.get(id(p)) if p.requires_grad else None)
                for name, p in parameters
            ),
            visits=tuple(visits),
            buffers=sum(each.numel() * each.element_size() for each in self.parts.buffers()),
            plain=plain,
            checkpointed=checkpointed,
            is_converted=self.is_converted,
        )


# How transformers' configs name the layers, of an encoder-decoder each of the two stacks.
_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")


def _set_layers(config: Any, layers: int) -> None:
    for name in (*_DEPTHS, "num_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _needs_tokenizer(recipe: Recipe) -> bool:
    config = recipe.model.config
    return (
        bool(recipe.model.add_tokens)
        or config is not None
        and not (isinstance(config, dict) and "vocab_size" in config)
    )


def _labels(stage: Any, facts: StageFacts) -> tuple[str, ...]:
    return tuple(stage.data.labels or facts.train.labels or SOME_LABELS)


def _size(plan: StagePlan) -> tuple[int, int]:
    """The rows and the length of a worker's share of a stage's largest micro-batch."""
    return plan.micro_batch, plan.share_length
