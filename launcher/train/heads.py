"""A head that starts from another one: kept whole, or matched by the names of its labels."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from launcher.errors import ModelError, nearest
from launcher.plan import sizes

if TYPE_CHECKING:
    from launcher.train.model import HeadStart


def check_labels(directory: str, options: dict[str, Any], stage: str) -> None:
    """Refuse to keep a head whose labels are not those of the stage's data."""
    wanted = list(options.get("id2label", {}).values())
    there = labels_of(directory)
    if wanted and there and wanted != there:
        raise ModelError(
            f"stages.{stage}.head: keep: the head has the labels {_shown(there)}, the data {_shown(wanted)}: let it"
            " start new, or match those that it knows by name"
        )


def labels_of(directory: str) -> list[str]:
    """Return the label words of a model directory, by their numbers; empty if its config names none."""
    if not (Path(directory) / "config.json").is_file():
        return []  # A hub id: transformers will tell what does not fit.
    table = sizes.read_config(Path(directory)).get("id2label") or {}
    return [table[key] for key in sorted(table, key=int)]


def values(start: "HeadStart", model: Any, names: list[str]) -> dict[str, Callable[[torch.Tensor], None]]:
    """Return by parameter how to put the values of an earlier head into it.

    Raises:
        ModelError: no label of the two heads has the same name.
    """
    directory = start.directory or ""
    before, now = labels_of(directory), [model.config.id2label[i] for i in range(model.config.num_labels)]
    pairs = [(i, before.index(word)) for i, word in enumerate(now) if word in before]
    if start.kind == "match" and not pairs:
        raise ModelError(
            f"stages.{start.stage}.head: match: none of the labels {_shown(now)} is among those of the head before"
            f" ({_shown(before)}){nearest(now[0], before)}: let it start new"
        )
    rows = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    found = read(Path(directory), names)

    def put(old: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def into(parameter: torch.Tensor) -> None:
            is_output = start.kind == "match" and old.shape[0] == len(before)
            if is_output and parameter.shape[0] == len(now):
                parameter[rows[:, 0]] = old[rows[:, 1]].to(parameter)
            elif parameter.shape == old.shape:
                parameter.copy_(old)

        return into

    return {name: put(tensor) for name, tensor in found.items()}


def read(directory: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Return tensors of a model directory by name; those that it does not have are left out."""
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            there = set(tensors.keys())
            found.update({name: tensors.get_tensor(name) for name in names if name in there})
    return found


def _shown(labels: list[str]) -> str:
    return ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
