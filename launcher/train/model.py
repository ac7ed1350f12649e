"""Weights, tokenizer, heads: the door to transformers. Under ZeRO-3 each rank only ever holds its share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from launcher import lean
from launcher.errors import ModelError
from launcher.recipe import Model
from launcher.train import heads, trainable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REMEDY = "; check the name, or give a directory, which needs no network"


def load_tokenizer(model: Model) -> Any:
    """Load the recipe's tokenizer; it has to be a fast one, since rows are tokenised in batches."""
    name = model.tokenizer or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code is not None
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer {name}: cannot be loaded: {_first_line(error)}{_REMEDY}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {name}: has no fast (Rust) version; give model.tokenizer one that has")
    tokenizer.add_tokens(model.add_tokens)
    return tokenizer


def config_of(model: Model, vocabulary: int) -> Any:
    """Load the config of the recipe's model, or build it from `model.config` for a vocabulary.

    Raises:
        ModelError: transformers does not know it.
    """
    if model.config is not None:
        return _config_of(model, vocabulary)
    trust = model.trust_remote_code is not None
    try:
        return AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        why = _first_line(error)
        raise ModelError(f"model {model.path}: its config cannot be loaded: {why}{_REMEDY}") from None


def grow(model: Model, auto_model: str, directory: Path, vocabulary: int) -> None:
    """Save the recipe's model into `directory` with embeddings for a larger vocabulary.

    One process does it before the training, so that no rank has to resize what ZeRO-3 has partitioned.
    The new rows are drawn around the mean of the old ones, as transformers does.
    """
    torch.manual_seed(model.init_seed)  # Also of what the weights lack, like a pooler.
    loaded = getattr(transformers, auto_model).from_pretrained(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code is not None,
        dtype="auto",
    )
    if loaded.get_input_embeddings().num_embeddings < vocabulary:
        loaded.resize_token_embeddings(vocabulary)
    _save(loaded, directory)


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
    _save(built, directory)


def _save(built: Any, directory: Path) -> None:
    # Asked whether the model is wrapped, accelerate imports DeepSpeed where that is installed, to see: a second or two.
    with lean.without("deepspeed"):
        built.save_pretrained(directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStart:
    """What a model's head starts from.

    Attributes:
        kind: `new`, `keep` or `match`; see the recipe's `head.start`.
        directory: an export whose head is meant, where it is not that of the model itself.
        seed: of what is drawn at random.
        stage: its name, for messages.
    """

    kind: str
    directory: str | None
    seed: int
    stage: str


def load(
    model: Model,
    directory: str,
    auto_model: str,
    *,
    options: dict[str, Any],
    head: HeadStart,
    dtype: str,
    ds: dict[str, Any],
) -> tuple[Any, list[str]]:
    """Load a model for one stage.

    Args:
        model: the recipe's section.
        directory: the hub id or directory to load; an earlier stage's export, or the first model.
        auto_model: the transformers Auto class.
        options: settings for the config, e.g. the labels.
        head: what its head starts from.
        dtype: fp32, bf16 or fp16.
        ds: the resolved ds config; under ZeRO-3 the model is partitioned while it is built.

    Returns:
        The model; the names of the parameters that are not from the directory: a new head, perhaps a pooler.

    Raises:
        ModelError: there is no head to keep, or it has other labels.
    """
    auto_class = getattr(transformers, auto_model)
    is_own = head.kind == "keep" and head.directory is None
    left_out = [] if is_own else _head_names(auto_class, model, directory, options)
    if head.kind == "keep":
        heads.check_labels(head.directory or directory, options, head.stage)
    with _partitioning(ds):
        loaded, info = auto_class.from_pretrained(
            directory,
            revision=model.revision if directory == model.path else None,
            trust_remote_code=model.trust_remote_code is not None,
            dtype=DTYPES[dtype],
            attn_implementation=None if model.attention == "auto" else model.attention,
            key_mapping={rf"^{re.escape(name)}$": f"left_out.{name}" for name in left_out} or None,
            # Outside ZeRO-3 transformers takes a mapped name back where the model has the old one.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        if wrong := sorted({name for name, *_ in info["mismatched_keys"]} - set(left_out)):
            raise ModelError(f"model {directory}: the weights have other sizes than its config: {wrong[0]}")
        missing = [name for name in sorted(info["missing_keys"]) if name not in left_out]
        if is_own and set(missing) & set(trainable.head_names(loaded)):
            raise ModelError(f"stages.{head.stage}.head: {directory} has no head to keep: let it start new")
        known = {} if head.kind == "new" or is_own else heads.values(head, loaded, left_out + missing)
        _initialise_head(loaded, left_out + missing, head.seed, known)
    loaded.config.use_cache = False
    return loaded, left_out + missing


@contextmanager
def gathered(parameters: list[torch.nn.Parameter], *, writer: int | None = None) -> Iterator[None]:
    """Make partitioned parameters whole for a moment; a no-op for parameters that are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


@contextmanager
def _partitioning(ds: dict[str, Any]) -> Iterator[None]:
    """Let from_pretrained meet ZeRO-3: it asks for this object by a weak reference, so it must live on."""
    import deepspeed
    from deepspeed.utils import groups as ds_groups
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from launcher.train import light as _light  # noqa: F401  before DeepSpeed does what it leaves out

    # Before this, DeepSpeed takes the number of workers for 1, and finds the batch sizes inconsistent.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    # hpZ makes its group anew for each model, and refuses where one is known: jointly there are several models.
    ds_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
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
    return trainable.head_names(skeleton)


def _initialise_head(model: Any, names: list[str], seed: int, known: dict[str, Any]) -> None:
    """Draw a new head on rank 0, each parameter from its own generator: the same in every ZeRO stage.

    Args:
        model: the model.
        names: the parameters to draw.
        seed: of the draw.
        known: by name a function that puts known values into those drawn, in place.
    """
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    parameters = dict(model.named_parameters())
    for i, name in enumerate(names):
        if name not in parameters:
            continue
        parameter = parameters[name]
        with gathered([parameter], writer=0), torch.no_grad():
            if parameter.dim() >= 2:
                draw = torch.Generator().manual_seed(seed * 1000 + i)
                values = torch.empty(parameter.shape).normal_(0.0, deviation, generator=draw)
                parameter.copy_(values)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            if name in known:
                known[name](parameter)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
