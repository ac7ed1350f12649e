"""Which parameters move and how fast: freezing, layers, learning rates, as groups for the optimizer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.errors import ModelError
from launcher.recipe import Stage

# How transformers names the layers of a trunk: bert.encoder.layer.3, model.layers.3, transformer.h.3, …
_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that the optimizer treats alike.

    Attributes:
        is_decayed: whether weight decay applies: to matrices, not to biases and norms.
        scale: of the stage's learning rate.
        opens_after: steps after which they begin to move.
    """

    parameters: tuple[nn.Parameter, ...]
    is_decayed: bool
    scale: float
    opens_after: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is: 0 the embeddings, then the layers, last the head and what precedes it."""

    name: str
    parameter: nn.Parameter
    depth: int
    is_head: bool


def head_names(model: Any) -> list[str]:
    """Return the parameters outside a transformers model's trunk."""
    names = [name for name, _ in model.named_parameters()]
    if not hasattr(model, model.base_model_prefix):
        # T5 has no trunk of its own: all but the output layer is the trunk.
        return [name for name in names if name.startswith("lm_head.")]
    return [name for name in names if not name.startswith(model.base_model_prefix + ".")]


def places(model: Any) -> tuple[list[Place], int]:
    """Return where each parameter of a transformers model is, and the number of its layers.

    An encoder-decoder's layers are counted in each of its two stacks.
    """
    outside = set(head_names(model))
    found: list[tuple[str, nn.Parameter, int | None]] = []
    for name, parameter in model.named_parameters():
        match = None if name in outside else _LAYER.search(name)
        found.append((name, parameter, int(match.group(1)) + 1 if match else None))
    num_layers = max((layer for _, _, layer in found if layer), default=0)
    result, is_before = [], True
    for name, parameter, layer in found:
        is_before = is_before and layer is None
        # What stands after the first layer without being in one is a final norm or a pooler.
        depth = layer or (0 if is_before and name not in outside else num_layers + 1)
        result.append(Place(name, parameter, depth, name in outside))
    return result, num_layers


def freeze(model: Any, stage: Stage) -> None:
    """Set which parameters of a model are trained.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left to train.
    """
    asked, where = stage.trainable, f"stages.{stage.name}.trainable"
    located, num_layers = places(model)
    if asked.last_layers is not None:
        if asked.last_layers > num_layers:
            raise ModelError(
                f"{where}.last_layers is {asked.last_layers}, but the model has {num_layers} layers"
            )
        for place in located:
            if place.depth <= num_layers - asked.last_layers:
                place.parameter.requires_grad_(False)
    for pattern in asked.freeze:
        try:
            matched = [place for place in located if re.search(pattern, place.name)]
        except re.error as error:
            raise ModelError(f'{where}.freeze: "{pattern}" is no regular expression: {error}') from None
        if not matched:
            examples = ", ".join(place.name for place in (located[0], located[-1]))
            raise ModelError(
                f'{where}.freeze: "{pattern}" matches none of the {len(located)} parameters (they are named'
                f" like {examples})"
            )
        for place in matched:
            place.parameter.requires_grad_(False)
    if not any(place.parameter.requires_grad for place in located):
        raise ModelError(f"{where}: nothing is left to train: freeze less")


def groups(model: Any, extra: nn.Module | None, stage: Stage) -> Iterator[Group]:
    """Yield a model's trainable parameters, grouped by what the recipe says of their learning rate.

    Layer-wise decay as in ULMFiT (Howard and Ruder, 2018), as is gradual unfreezing: until a group's time
    has come its learning rate is 0, which leaves both weights and the optimizer's memory as they are
    needed for going on from any step.
    """
    asked, (located, num_layers) = stage.trainable, places(model)
    if extra is not None:
        located += [Place(name, p, num_layers + 1, True) for name, p in extra.named_parameters()]
    of_head = (stage.head.learning_rate or stage.learning_rate) / stage.learning_rate
    sorted_out: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    for place in located:
        if not place.parameter.requires_grad:
            continue
        below = num_layers + 1 - place.depth
        scale = of_head if place.is_head else asked.layer_decay**below
        opens_after = (asked.unfreeze_every or 0) * below
        key = (num_dimensions(place.parameter) >= 2, scale, opens_after)
        sorted_out.setdefault(key, []).append(place.parameter)
    for (is_decayed, scale, opens_after), parameters in sorted_out.items():
        yield Group(tuple(parameters), is_decayed, scale, opens_after)


def merged(all_groups: list[Group]) -> list[Group]:
    """Join the groups of several models that share parameters: each once, with the last model's settings."""
    seen: set[int] = set()
    by_key: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    for group in reversed(all_groups):
        new = [p for p in group.parameters if id(p) not in seen]
        seen.update(map(id, new))
        by_key.setdefault((group.is_decayed, group.scale, group.opens_after), []).extend(new)
    # Matrices first, as DeepSpeed's checkpoints have had them.
    keys = sorted((key for key in by_key if by_key[key]), key=lambda key: (not key[0], key[2], -key[1]))
    return [Group(tuple(by_key[key]), *key) for key in keys]


def num_parameters(module: nn.Module) -> tuple[int, int]:
    """Return how many parameters a module has, and how many of them are trained."""
    total = trained = 0
    for parameter in module.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        trained += size if parameter.requires_grad else 0
    return total, trained


def num_dimensions(parameter: nn.Parameter) -> int:
    """Return a parameter's dimensions. A partitioned one is flat; DeepSpeed keeps its true shape beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
