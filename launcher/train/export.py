"""The trained engine to one Hugging Face directory, tensor by tensor; then verified by reading it back."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher import storage
from launcher.errors import ExportFailed
from launcher.recipe import Stage
from launcher.train import adapters
from launcher.train import model as models

SHARD_BYTES = 5 * 2**30
PROBE = "probe.safetensors"
# Rounding of one forward pass on other hardware or with other kernels, relative to the largest logit.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def write(module: Any, tokenizer: Any, directory: Path, dtype: torch.dtype) -> None:
    """Write config, tokenizer and safetensors shards; every rank must call it. Adapters are merged.

    One tensor at a time is made whole; rank 0 holds at most one shard of `SHARD_BYTES`, other ranks
    at most one tensor. The directory appears when it is complete.
    """
    is_writer = dist.get_rank() == 0
    aside = directory.with_name(f".{directory.name}.writing")
    if is_writer:
        storage.delete(aside)
        aside.mkdir(parents=True)
    shards = _Shards(aside)
    parameters = dict(module.named_parameters())
    for parameter_name, parameter in parameters.items():
        name = adapters.merged_name(parameter_name)
        if name is None:
            continue
        pieces, layer = adapters.to_gather(module, parameter_name, parameter)
        with models.gathered(pieces):
            if is_writer:
                value = parameter.detach() if layer is None else adapters.merged_value(parameter, layer)
                shards.add(name, value.to("cpu", dtype, copy=True))
    if is_writer:
        for name, value in module.state_dict().items():
            is_adapter = adapters.merged_name(name) != name
            if name not in parameters and not is_adapter and not _is_tied(module, name, parameters):
                shards.add(name, value.detach().cpu())
        shards.close()
        _write_settings(module, tokenizer, aside, dtype)
        storage.delete(directory)
        os.replace(aside, directory)
    dist.barrier()


def write_adapter(module: Any, stage: Stage, base: str, directory: Path, dtype: torch.dtype) -> None:
    """Write the adapters and the head as a directory for peft; every rank must call it."""
    is_writer, tensors = dist.get_rank() == 0, {}
    for name, parameter in adapters.adapter_tensors(module):
        with models.gathered([parameter]):
            if is_writer:
                tensors[name] = parameter.detach().to("cpu", dtype, copy=True).contiguous()
    if is_writer:
        with storage.new_directory(directory) as aside:
            save_file(tensors, str(aside / "adapter_model.safetensors"), metadata={"format": "pt"})
            adapters.write_settings(module, stage, base, aside)
    dist.barrier()


def write_probe(path: Path, features: dict[str, Any], logits: torch.Tensor) -> None:
    """Keep a fixed batch and the trained engine's logits on it, for `verify`."""
    tensors = {name: torch.from_numpy(v) for name, v in features.items() if not name.startswith("_")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, "logits": logits.contiguous()}, str(path))


def verify(directory: Path, task: Any, probe: Path) -> float:
    """Read an export back, and compare it with what was trained. To be run in a process of its own.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportFailed: a tensor is missing, empty, all zero where it should not be, or of another dtype
            than the config says; or the logits differ by more than rounding.
    """
    import transformers

    model, info = getattr(transformers, task.auto_model).from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info.get("mismatched_keys"):
        wrong = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["unexpected_keys"]))
        raise ExportFailed(f"{directory}: tensors missing or unexpected: {', '.join(wrong[:5])}")
    _check_tensors(directory, model.config.dtype or torch.float32)
    tensors = load_file(str(probe))
    trained = tensors.pop("logits")
    model.eval()
    model.config.use_cache = False
    with torch.no_grad():
        outputs = task.outputs(model, task.load_extra(directory), tensors)
    logits = (outputs[0] if isinstance(outputs, tuple) else outputs).float()
    real = _real(logits, tensors)
    difference = float((logits[real] - trained[real]).abs().max() / trained[real].abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCES[model.dtype]:
        raise ExportFailed(
            f"{directory}: logits differ from the trained model's by {difference:.2g} of their size;"
            " the checkpoint is kept"
        )
    return difference


def _real(logits: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
    """Where logits are not of padding: they stand for inputs, for labels, or for whole samples."""
    for mask in (tensors["attention_mask"].bool(), tensors.get("labels", logits.new_empty(0)) != -100):
        if logits.dim() == 3 and mask.shape == logits.shape[:2]:
            return mask
    return slice(None)


class _Shards:
    """safetensors files of bounded size, with transformers' index when there is more than one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        self._flush()
        count = len(self.names)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.names):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            os.replace(self.directory / f"shard-{i}", self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        path = self.directory / f"shard-{len(self.names)}"
        save_file(self.pending, str(path), metadata={"format": "pt"})
        self.names.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0


def _write_settings(module: Any, tokenizer: Any, directory: Path, dtype: torch.dtype) -> None:
    config = module.config
    config.architectures = [type(module).__name__]
    config.dtype = dtype
    used, config.use_cache = config.use_cache, True
    config.save_pretrained(directory)
    config.use_cache = used
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        module.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _is_tied(module: Any, name: str, parameters: dict[str, Any]) -> bool:
    return any(value is parameter for value in [_find(module, name)] for parameter in parameters.values())


def _find(module: Any, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None)


def _check_tensors(directory: Path, dtype: torch.dtype) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                is_matrix = tensor.dim() >= 2
                if tensor.numel() == 0 or (is_matrix and not tensor.any()):
                    raise ExportFailed(f"{file}: {name} is {'empty' if not tensor.numel() else 'all zero'}")
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    raise ExportFailed(f"{file}: {name} is {tensor.dtype}, the config says {dtype}")
