"""Low-rank adapters: put into a model by peft, merged at export, or exported alone for peft."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.errors import ModelError
from launcher.recipe import Stage
from launcher.train import trainable

NAME = "default"
_TASK_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "translation": "SEQ_2_SEQ_LM",
    "causal-lm": "CAUSAL_LM",
}


def add(model: Any, stage: Stage, drawn: Sequence[str] = ()) -> None:
    """Put adapters into a model: they and the head are trained, the trunk is not.

    The model keeps its class, so that everything that knows it goes on working. Adapters begin as no
    change at all.

    Args:
        model: the model.
        stage: its stage.
        drawn: parameters that begin at random: where the trunk has some, like a pooler that the weights
            lack, they are trained like the head.

    Raises:
        ModelError: peft does not know which modules to adapt, or none has the given names.
    """
    from peft import inject_adapter_in_model

    # What the stage trains of its head is decided before peft freezes all but the adapters.
    wanted = {*trainable.head_names(model), *drawn}
    if stage.task in ("causal-lm", "translation"):
        wanted = set()
    head = [p for name, p in model.named_parameters() if name in wanted and p.requires_grad]
    torch.manual_seed(stage.seed)  # Each rank draws the same.
    try:
        inject_adapter_in_model(_config(stage), model, adapter_name=NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"stages.{stage.name}.trainable.lora: {reason}: name the modules to adapt in lora.modules"
        ) from None
    for parameter in head:
        parameter.requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model holds adapters."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def merged_name(name: str) -> str | None:
    """Return what a parameter is called once adapters are merged; None for those of the adapter."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def to_gather(model: Any, name: str, parameter: nn.Parameter) -> tuple[list[nn.Parameter], Any]:
    """Return what has to be whole to export a parameter, and its adapted layer if it has one."""
    owner, _, leaf = name.rpartition(".base_layer.")
    if not owner or leaf != "weight":
        return [parameter], None
    layer = model.get_submodule(owner)
    pieces = [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight] if NAME in layer.lora_A else []
    return [parameter, *pieces], layer if pieces else None


def merged_value(parameter: nn.Parameter, layer: Any) -> torch.Tensor:
    """Return a gathered parameter with its adapter's change added, in fp32."""
    value = parameter.detach().float()
    return value if layer is None else value + layer.get_delta_weight(NAME).detach().float()


def adapter_tensors(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Return (peft's name, parameter) of all that an adapter directory holds."""
    return [
        ("base_model.model." + name.replace(f".{NAME}.", "."), parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" in name or parameter.requires_grad
    ]


def write_settings(model: Any, stage: Stage, base: str, directory: Path) -> None:
    """Write peft's adapter_config.json.

    Args:
        model: with adapters.
        stage: the recipe's stage.
        base: the model that the adapter is for: a hub id or a directory.
        directory: the adapter's.
    """
    config = _config(stage)
    config.base_model_name_or_path = base
    config.target_modules = sorted(
        {
            name.partition(".lora_A.")[0].rpartition(".")[2]
            for name, _ in model.named_parameters()
            if ".lora_A." in name
        }
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in trained}) or None
    config.inference_mode = True
    config.save_pretrained(str(directory))


def _config(stage: Stage) -> Any:
    from peft import LoraConfig

    lora = stage.trainable.lora
    assert lora is not None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.modules,
        task_type=_TASK_TYPES.get(stage.task),  # What peft has no name for, it takes without one.
    )
