"""What a model's files say without being loaded: positions, hidden size, parameters from headers."""

import json
import struct
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.plan.plan import ModelFacts
from launcher.recipe import Model

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# RoBERTa's family counts positions from the padding index on, so two of the table are never used.
_OFFSET_TYPES = {"roberta", "xlm-roberta", "camembert", "longformer", "data2vec-text", "ibert"}
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_HEAD_KEYS, _KV_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads"), ("num_key_value_heads",)
_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "dim")


def model_facts(model: Model) -> ModelFacts:
    """Read what can be known of the model before anything is downloaded or built.

    A hub id that is not a local directory gives no facts here: the preparation, which runs where the
    hub can be reached, checks it.

    Raises:
        ModelError: a local directory lacks config.json or weights, or a config cannot be read.
    """
    if isinstance(model.config, dict):
        return _facts(model.config, None)
    if model.config is not None:
        return _facts(read_config(Path(model.config)), None)
    folder = Path(model.path or "")
    if not folder.is_absolute():
        return ModelFacts()
    config = read_config(folder)
    weights = [file for pattern in WEIGHT_FILES for file in sorted(folder.glob(pattern))]
    if not weights:
        raise ModelError(
            f"{folder}: has no weights (model.safetensors or pytorch_model.bin): finish the download,"
            " or use model.config for random initialisation"
        )
    return _facts(config, _count_parameters(weights))


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json, given the file or its directory."""
    if not path.exists():
        raise ModelError(f"{path}: no such model directory or config file")
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: has no config.json, so it is not a model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file}: has no model_type, so transformers cannot tell which model it is")
    return config


def _facts(config: dict[str, Any], num_parameters: int | None) -> ModelFacts:
    text = config.get("text_config") or config
    positions = _first(text, _POSITION_KEYS)
    if positions and config.get("model_type") in _OFFSET_TYPES:
        positions -= 2
    return ModelFacts(
        num_parameters=num_parameters,
        hidden_size=_first(text, _HIDDEN_KEYS),
        max_positions=positions,
        num_heads=_first(text, _HEAD_KEYS),
        num_kv_heads=_first(text, _KV_HEAD_KEYS),
    )


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key)), None)


def _count_parameters(files: list[Path]) -> int | None:
    """Add up the shapes in the headers of safetensors files; other formats are not opened."""
    total = 0
    for file in files:
        if file.suffix != ".safetensors":
            return None
        for entry in _header(file).values():
            count = 1
            for length in entry.get("shape", [0]):
                count *= length
            total += count
    return total


def _header(file: Path) -> dict[str, Any]:
    # Format: 8 bytes little-endian length, then JSON (huggingface/safetensors README, "Format").
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error):
        raise ModelError(f"{file}: is not a whole safetensors file: download it again") from None
    header.pop("__metadata__", None)
    return header
