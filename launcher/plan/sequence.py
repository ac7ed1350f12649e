"""How long samples are divided: which workers share one (sequence parallelism), and what runs in tiles."""

from typing import TYPE_CHECKING, Literal

from launcher.errors import DsConfigError
from launcher.recipe import Recipe, Stage

if TYPE_CHECKING:
    from launcher.plan.plan import ModelFacts, World

KEY = "sequence_parallel_size"
TOKENS_OF_ONE = 16_384
"""`"auto"`: a worker's share of a sample is to be no longer than this, if there are workers enough."""
MLP_TOKENS, MLP_TILE = 32_768, 8_192
"""From so many tokens of a micro-batch on, the layers' feed-forward networks take them in tiles of so many."""


def team(
    asked: int | Literal["auto"],
    recipe: Recipe,
    stage: Stage,
    model: "ModelFacts",
    world: "World",
    longest: int,
    where: str,
) -> int:
    """Return how many workers share each sample of a stage.

    Args:
        asked: the ds config's `sequence_parallel_size`.
        recipe: what was asked.
        stage: the stage.
        model: for the number of its attention heads.
        world: the workers that there are.
        longest: the most tokens of a sample.
        where: the ds config's file, for messages.

    Raises:
        DsConfigError: a number was asked for that cannot be.
    """
    if asked == "auto":
        if fault_of_stage(recipe, stage) or model.num_heads is None or recipe.transfer == "joint":
            return 1
        sizes = [n for n in range(1, world.num_workers + 1) if not _fault(n, model, world)]
        return next((n for n in sizes if n * TOKENS_OF_ONE >= longest), sizes[-1])
    if asked == 1:
        return 1
    fault = fault_of_stage(recipe, stage) or _fault(asked, model, world)
    if fault:
        raise DsConfigError(f"{where}: {KEY} is {asked}, but {fault}: write 1, or leave it out")
    return asked


def fault_of_stage(recipe: Recipe, stage: Stage) -> str:
    """Return why a stage's samples cannot be divided; empty if they can."""
    if stage.task != "causal-lm":
        return f"stages.{stage.name}.task is {stage.task}, and only samples of causal-lm can be divided"
    if stage.generation.exact_match:
        return f"stages.{stage.name}.generation.exact_match is true, and answers are generated from whole samples"
    if recipe.model.attention == "eager":
        return "model.attention is eager, which cannot be given heads of whole samples"
    return ""


def fault_of_heads(size: int, num_heads: int, num_kv_heads: int) -> str:
    """Return why attention heads cannot be dealt out to `size` workers; empty if they can."""
    if num_heads % size:
        return f"the model has {num_heads} attention heads, which {size} does not divide"
    if num_kv_heads % size and size % num_kv_heads:
        return (
            f"the model has {num_kv_heads} heads of keys and values, which do not divide among {size} workers"
        )
    return ""


def _fault(size: int, model: "ModelFacts", world: "World") -> str:
    if world.num_workers % size:
        return f"there are {world.num_workers} workers, which {size} does not divide"
    if model.num_heads is None:
        return ""  # The workers will see.
    return fault_of_heads(size, model.num_heads, model.num_kv_heads or model.num_heads)


def mlp_tile(rows: int, length: int, *, recomputes: bool) -> int | None:
    """Return the tokens of a tile of the feed-forward networks; None: whole micro-batches.

    Tiles cost one more forward of these networks. Where activations are computed again, what one network holds
    is the largest thing that is left of long samples; else it would be a small part.

    Args:
        rows, length: of a worker's micro-batch.
        recomputes: whether activations are computed again in the backward.
    """
    return MLP_TILE if recomputes and rows * length >= MLP_TOKENS else None
