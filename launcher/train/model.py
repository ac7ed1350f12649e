"""Weights, tokenizer, heads: the door to transformers. Under ZeRO-3 each rank only ever holds its share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from launcher.errors import ModelError
from launcher.recipe import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(model: Model) -> Any:
    """Load the recipe's tokenizer; it has to be a fast one, since rows are tokenised in batches."""
    name = model.tokenizer or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code is not None
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer {name}: cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {name}: has no fast (Rust) version; give model.tokenizer one that has")
    return tokenizer


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with; its positions are masked, so models without one can use any."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def initialise(model: Model, auto_model: str, directory: Path, vocabulary: int) -> None:
    """Build a model from `model.config` at random, once, and save it into `directory`.

    One process makes the weights that all ranks then load, so they do not depend on the number of
    ranks or the ZeRO stage.

    Raises:
        ModelError: transformers cannot build it, or its vocabulary is smaller than the tokenizer's.
    """
    config = _config_of(model, vocabulary)
    if config.get_text_config().vocab_size < vocabulary:
        raise ModelError(
            f"model.config: vocab_size is {config.get_text_config().vocab_size}, but the tokenizer has"
            f" {vocabulary} tokens: raise it to at least that"
        )
    torch.manual_seed(model.init_seed)
    built = getattr(transformers, auto_model).from_config(config)
    built.save_pretrained(directory)


def load(
    model: Model,
    directory: str,
    auto_model: str,
    *,
    options: dict[str, Any],
    new_head: bool,
    dtype: str,
    ds: dict[str, Any],
    seed: int,
) -> Any:
    """Load a model for one stage.

    Args:
        model: the recipe's section.
        directory: the hub id or directory to load; an earlier stage's export, or the first model.
        auto_model: the transformers Auto class.
        options: settings for the config, e.g. the labels.
        new_head: leave out the stored head and initialise another.
        dtype: fp32, bf16 or fp16.
        ds: the resolved ds config; under ZeRO-3 the model is partitioned while it is built.
        seed: of the new head.
    """
    auto_class = getattr(transformers, auto_model)
    head = _head_names(auto_class, model, directory, options) if new_head else []
    with _partitioning(ds):
        loaded = auto_class.from_pretrained(
            directory,
            revision=model.revision if directory == model.path else None,
            trust_remote_code=model.trust_remote_code is not None,
            dtype=DTYPES[dtype],
            attn_implementation=None if model.attention == "auto" else model.attention,
            key_mapping={rf"^{re.escape(name)}$": f"left_out.{name}" for name in head} or None,
            **options,
        )
        _initialise_head(loaded, head, seed)
    loaded.config.use_cache = False
    return loaded


@contextmanager
def gathered(parameters: list[torch.nn.Parameter], *, writer: int | None = None) -> Iterator[None]:
    """Make partitioned parameters whole for a moment; a no-op for parameters that are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with and those without weight decay.

    Biases and norms (fewer than two dimensions) are left out of the decay, as is usual.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if _num_dimensions(p) >= 2]
    others = [p for p in trainable if _num_dimensions(p) < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: torch.nn.Parameter) -> int:
    # A partitioned parameter is flat and empty; DeepSpeed keeps its true shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def _partitioning(ds: dict[str, Any]) -> Iterator[None]:
    """Let from_pretrained meet ZeRO-3: it asks for this object by a weak reference, so it must live on."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Before this, DeepSpeed takes the number of workers for 1, and finds the batch sizes inconsistent.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    alive = HfDeepSpeedConfig(ds)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def _config_of(model: Model, vocabulary: int) -> Any:
    keys: dict[str, Any]
    if isinstance(model.config, dict):
        keys = dict(model.config)
    else:
        path = Path(model.config or "")
        keys = AutoConfig.from_pretrained(path.parent if path.is_file() else path).to_dict()
    keys.setdefault("vocab_size", vocabulary)
    try:
        return AutoConfig.for_model(**keys)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.config: {_first_line(error)}") from None


def _head_names(auto_class: Any, model: Model, directory: str, options: dict[str, Any]) -> list[str]:
    """The names of the parameters outside the trunk, found on the meta device."""
    trust = model.trust_remote_code is not None
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust, **options)
    with torch.device("meta"):
        skeleton = auto_class.from_config(config, trust_remote_code=trust)
    trunk = skeleton.base_model_prefix + "."
    return [name for name, _ in skeleton.named_parameters() if not name.startswith(trunk)]


def _initialise_head(model: Any, names: list[str], seed: int) -> None:
    """Draw a new head on rank 0, each parameter from its own generator: the same in every ZeRO stage."""
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    parameters = dict(model.named_parameters())
    for i, name in enumerate(names):
        parameter = parameters[name]
        with gathered([parameter], writer=0), torch.no_grad():
            if parameter.dim() >= 2:
                draw = torch.Generator().manual_seed(seed * 1000 + i)
                values = torch.empty(parameter.shape).normal_(0.0, deviation, generator=draw)
                parameter.copy_(values)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
