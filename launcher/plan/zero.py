"""A ds config made whole: every key checked by name, every "auto" filled in, contradictions refused.

DeepSpeed takes a misspelt top-level key in silence and turns a leftover "auto" of the ZeRO section
into a default of its own, so both are settled here, before any worker starts. Neither torch nor
deepspeed is imported.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import DsConfigError, nearest
from launcher.plan import ds_keys, offload

Config = dict[str, Any]
Dtype = Literal["fp32", "bf16", "fp16"]

NEVER = 1_000_000_000
"""`steps_per_print`: the launcher has its own record of a step."""
LEAST_AREA = 4096 * 4096
"""Elements of a bucket, at least: of fewer, a collective costs what it costs to begin one."""
SCHEDULE_OF = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "WarmupLR": "constant"}
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "count": "a whole number above 0",
    "size": "a whole number, 0 or more",
    "number": "a number",
    "numbers": "a number, or a list of numbers",
    "text": "text",
    "list": "a list",
    "open": "an object",
    "stage": "0, 1, 2 or 3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the recipe, the model and the world decide for one stage."""

    micro_batch: int
    accumulation: int
    num_workers: int
    team: int = 1
    """Workers that share each sample."""
    global_batch: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    gradient_clipping: float
    dtype: Dtype
    schedule: str
    warmup_steps: int
    num_steps: int
    hidden_size: int | None
    device: Literal["cpu", "cuda"]
    written: frozenset[str]
    """The recipe's keys that the user wrote, as opposed to defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a ds config fixes: its values that are present and not "auto"."""

    train_batch_size: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    gradient_clipping: float | None = None
    dtype: Dtype | None = None
    disabled: frozenset[str] = frozenset()
    """Precisions switched off by name."""
    scheduler: str | None = None
    warmup_steps: int | None = None
    max_learning_rate: float | None = None
    zero_stage: int = 0
    hpz_size: int = 1
    """Workers that share one more copy of the parameters, for the backward."""
    team: int | Literal["auto"] = 1
    """Workers that share each sample: sequence_parallel_size."""

    @property
    def has_scheduler(self) -> bool:
        """Whether DeepSpeed, not the recipe, schedules the learning rate."""
        return self.scheduler is not None


def load(path: str) -> Config:
    """Read a ds config file.

    Raises:
        DsConfigError: it is missing, not JSON, not an object, or names a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> Config:
        config: Config = {}
        for key, value in pairs:
            if key in config:
                raise DsConfigError(f'{path}: "{key}" is there twice in one object')
            config[key] = value
        return config

    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file, object_pairs_hook=once)
    except OSError as error:
        raise DsConfigError(f"{path}: cannot read the ds config: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DsConfigError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DsConfigError(f"{path}: not valid JSON: {error.msg} at {where}") from error
    if not isinstance(config, dict):
        raise DsConfigError(f"{path}: a ds config is a JSON object, this is a {type(config).__name__}")
    return config


def check(config: Mapping[str, Any], where: str) -> None:
    """Refuse keys that DeepSpeed does not know or no longer knows, and values that it cannot mean.

    Raises:
        DsConfigError: with the key's full name, and the nearest right one or what to do.
    """
    _check_section(config, ds_keys.KEYS, "", where)
    _check_optimizer(config.get("optimizer") or {}, where)
    _check_scheduler(config.get("scheduler") or {}, where)
    for path, (allowed, reason) in ds_keys.ONLY.items():
        value = _at(config, path)
        plain = value.lower() if isinstance(value, str) else value
        if plain is not None and plain not in allowed:
            words = " or ".join(_show(each) for each in allowed)
            raise DsConfigError(f"{where}: {path} is {_show(value)}: only {words} can run here: {reason}")
    if len(_enabled(_plain(config), True)) > 1:
        raise DsConfigError(f"{where}: fp16.enabled and bf16.enabled are both true: choose one")
    if config.get("sequence_parallel_size", 1) != 1 and "data_parallel_size" in config:
        # DeepSpeed would make a mesh of the two, and average gradients in another way.
        raise DsConfigError(f"{where}: data_parallel_size follows from sequence_parallel_size: leave it out")
    offload.check(config, where)
    _refuse_auto(config, where, ds_keys.FILLED)


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage, 0 if the config names none."""
    return int(_at(config, "zero_optimization.stage") or 0)


def given(config: Mapping[str, Any]) -> Given:
    """Return what the ds config fixes."""
    plain = _plain(config)
    on, off = _enabled(plain, True), _enabled(plain, False)
    dtype: Dtype | None = "bf16" if "bf16" in on else "fp16" if "fp16" in on else None
    if dtype is None and off == {"fp16", "bf16"}:
        dtype = "fp32"
    betas = _fixed(plain, "optimizer.params.betas")
    return Given(
        train_batch_size=_fixed(plain, "train_batch_size"),
        micro_batch=_fixed(plain, "train_micro_batch_size_per_gpu"),
        accumulation=_fixed(plain, "gradient_accumulation_steps"),
        learning_rate=_fixed(plain, "optimizer.params.lr"),
        weight_decay=_fixed(plain, "optimizer.params.weight_decay"),
        betas=None if betas is None else (betas[0], betas[1]),
        eps=_fixed(plain, "optimizer.params.eps"),
        gradient_clipping=_fixed(plain, "gradient_clipping"),
        dtype=dtype,
        disabled=frozenset(off),
        scheduler=_fixed(plain, "scheduler.type"),
        warmup_steps=_fixed(plain, "scheduler.params.warmup_num_steps"),
        max_learning_rate=_fixed(plain, "scheduler.params.warmup_max_lr"),
        zero_stage=zero_stage(plain),
        team=plain.get("sequence_parallel_size", 1),
        hpz_size=int(_fixed(plain, "zero_optimization.zero_hpz_partition_size") or 1),
    )


def contradictions(given: Given, asked: Asked, where: str, stage_name: str) -> None:
    """Refuse a ds config and a recipe that want different things, and a ds config that contradicts itself.

    Raises:
        DsConfigError: with both values and both keys.
    """
    pairs = (
        ("train_batch_size", given.train_batch_size, "global_batch", asked.global_batch),
        ("train_micro_batch_size_per_gpu", given.micro_batch, "micro_batch", asked.micro_batch),
        ("optimizer.params.lr", given.learning_rate, "learning_rate", asked.learning_rate),
        ("scheduler.params.warmup_max_lr", given.max_learning_rate, "learning_rate", asked.learning_rate),
        ("optimizer.params.weight_decay", given.weight_decay, "weight_decay", asked.weight_decay),
        ("optimizer.params.betas", given.betas, "betas", asked.betas),
        ("optimizer.params.eps", given.eps, "eps", asked.eps),
        ("gradient_clipping", given.gradient_clipping, "gradient_clipping", asked.gradient_clipping),
        ("scheduler.params.warmup_num_steps", given.warmup_steps, "warmup", max(1, asked.warmup_steps)),
    )
    for ds_key, ds_value, key, value in pairs:
        if ds_value is not None and key in asked.written and ds_value != value:
            says = f"comes to {value} steps" if key == "warmup" else f"is {_show(value)}"
            raise DsConfigError(
                f"{where}: {ds_key} is {_show(ds_value)}, but the recipe's stages.{stage_name}.{key} {says}:"
                ' make them equal, or write "auto" in the ds config'
            )
    _contradictory_schedule(given, asked, where, stage_name)
    _contradictory_dtype(given, asked, where)
    _contradictory_batch(given, asked, where)
    if given.hpz_size > 1 and asked.num_workers % min(given.hpz_size, asked.num_workers):
        raise DsConfigError(
            f"{where}: zero_optimization.zero_hpz_partition_size is {given.hpz_size}, which does not divide"
            f" {asked.num_workers} workers: write the number of GPUs of one machine, and use whole machines"
        )


def complete(config: Mapping[str, Any], asked: Asked) -> Config:
    """Return a new config with no "auto" left; whatever else the user wrote is unchanged.

    `train_batch_size` is micro-batch x accumulation x teams of workers, as DeepSpeed demands. It exceeds the
    global batch where that does not divide; micro-batches of weight zero fill up.

    Raises:
        DsConfigError: an "auto" sits where nothing decides it.
    """
    full = _plain(config)
    full["train_batch_size"] = asked.micro_batch * asked.accumulation * asked.num_workers // asked.team
    full["train_micro_batch_size_per_gpu"] = asked.micro_batch
    full["gradient_accumulation_steps"] = asked.accumulation
    _fill(full, "sequence_parallel_size", asked.team)
    _fill(full, "gradient_clipping", asked.gradient_clipping, absent=True)
    _complete_precision(full, asked.dtype)
    _complete_zero(full.get("zero_optimization") or {}, asked.hidden_size)
    _complete_optimizer(full, asked)
    _complete_scheduler(full.get("scheduler") or {}, asked)
    full.setdefault("steps_per_print", NEVER)
    _refuse_auto(full, "the ds config", frozenset())
    return full


def _check_section(section: Mapping[str, Any], known: ds_keys.Keys, prefix: str, where: str) -> None:
    for key, value in section.items():
        path = prefix + key
        if _is_comment(key):
            continue
        if path in ds_keys.REMOVED:
            raise DsConfigError(f'{where}: DeepSpeed removed "{path}": {ds_keys.REMOVED[path]}')
        if key not in known:
            raise DsConfigError(f'{where}: unknown key "{path}"{_hint(key, known)}')
        kind = known[key]
        if isinstance(kind, str):
            _check_value(path, value, kind, where)
        elif isinstance(value, Mapping):
            _check_section(value, kind, f"{path}.", where)
        elif value is not None or path not in ds_keys.NULLABLE_SECTIONS:
            example = ': write {"stage": 1}' if path == "zero_optimization" else ""
            raise DsConfigError(f"{where}: {path} is {_show(value)}: it must be an object{example}")


def _hint(key: str, known: ds_keys.Keys) -> str:
    homes = [name for name, keys in ds_keys.SECTIONS.items() if not isinstance(keys, str) and key in keys]
    if key in ds_keys.KEYS:
        return f': "{key}" belongs at the top'
    if close := nearest(key, known):
        return close
    return f': "{key}" belongs in "{homes[0]}"' if len(homes) == 1 else ""


def _check_value(path: str, value: Any, kind: str, where: str) -> None:
    nullable, kind = kind.endswith("?"), kind.removesuffix("?")
    if kind == "any" or (nullable and value is None) or (value == "auto" and kind != "open"):
        return
    if kind[0] in "=~":
        words = kind[1:].split("|")
        text = value.lower() if isinstance(value, str) and kind[0] == "~" else value
        fits, wanted = text in words, "one of " + ", ".join(f'"{word}"' for word in words)
    else:
        fits, wanted = _fits(kind, value), KINDS[kind]
    if not fits:
        raise DsConfigError(f"{where}: {path} is {_show(value)}: it must be {wanted}")


def _fits(kind: str, value: Any) -> bool:
    if kind in ("bool", "text", "list", "open"):
        return isinstance(value, {"bool": bool, "text": str, "list": list, "open": dict}[kind])
    if kind == "numbers" and isinstance(value, list):
        return all(_fits("number", each) for each in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return False
    # JSON writers spell sizes 5e8, which Python reads as a float.
    whole = isinstance(value, int) or value.is_integer()
    lowest = {"count": 1, "size": 0, "stage": 0}.get(kind, -math.inf)
    return kind in ("number", "numbers") or (whole and value >= lowest and (kind != "stage" or value <= 3))


def _check_optimizer(section: Mapping[str, Any], where: str) -> None:
    name, params = section.get("type"), section.get("params", {})
    if section and name is None:
        raise DsConfigError(f'{where}: optimizer has no type: write, for example, "type": "AdamW"')
    known = ds_keys.TORCH_OPTIMIZERS | ds_keys.DEEPSPEED_OPTIMIZERS
    if name is not None and name not in known and name.lower() not in ds_keys.DEEPSPEED_OPTIMIZERS:
        raise DsConfigError(f'{where}: unknown optimizer.type "{name}"{nearest(name, known)}')
    for key, value in params.items():
        path = f"optimizer.params.{key}"
        if path in ds_keys.REMOVED:
            raise DsConfigError(f'{where}: DeepSpeed removed "{path}": {ds_keys.REMOVED[path]}')
        kind = ds_keys.OPTIMIZER_PARAMS.get(key, "any")
        if isinstance(kind, str):
            _check_value(path, value, kind, where)
    betas = params.get("betas", "auto")
    if betas != "auto" and (len(betas) != 2 or not _fits("numbers", betas)):
        raise DsConfigError(f"{where}: optimizer.params.betas is {_show(betas)}: it must be two numbers")


def _check_scheduler(section: Mapping[str, Any], where: str) -> None:
    name = section.get("type")
    if name is None:
        return
    if name not in ds_keys.SCHEDULERS:
        raise DsConfigError(f'{where}: unknown scheduler.type "{name}"{nearest(name, ds_keys.SCHEDULERS)}')
    _check_section(section.get("params", {}), ds_keys.SCHEDULERS[name], "scheduler.params.", where)


def _contradictory_schedule(given: Given, asked: Asked, where: str, stage_name: str) -> None:
    kind = SCHEDULE_OF.get(given.scheduler or "", given.scheduler)
    if kind is not None and "schedule" in asked.written and kind != asked.schedule:
        raise DsConfigError(
            f"{where}: scheduler.type is {_show(given.scheduler)}, but the recipe's"
            f" stages.{stage_name}.schedule is {_show(asked.schedule)}: keep one of the two"
        )


def _contradictory_dtype(given: Given, asked: Asked, where: str) -> None:
    verb = "is" if "dtype" in asked.written else "comes to"
    recipe = f"the recipe's model.dtype {verb} {asked.dtype}"
    remedy = 'make them agree, or write "auto" in the ds config'
    if given.dtype is not None and given.dtype != "fp32" and given.dtype != asked.dtype:
        raise DsConfigError(f"{where}: {given.dtype}.enabled is true, but {recipe}: {remedy}")
    if asked.dtype in given.disabled:
        raise DsConfigError(f"{where}: {asked.dtype}.enabled is false, but {recipe}: {remedy}")
    if asked.dtype == "fp16" and asked.device == "cpu":
        raise DsConfigError(f"{where}: fp16 does not run on CPUs: choose fp32 or bf16")


def _contradictory_batch(given: Given, asked: Asked, where: str) -> None:
    batch, micro, accumulation = given.train_batch_size, given.micro_batch, given.accumulation
    if batch is None or micro is None or accumulation is None:
        return
    product = micro * accumulation * asked.num_workers // asked.team
    if batch != product:
        shared = f" / {asked.team} that share samples" if asked.team > 1 else ""
        raise DsConfigError(
            f"{where}: train_batch_size is {batch}, but train_micro_batch_size_per_gpu {micro} x"
            f" gradient_accumulation_steps {accumulation} x {asked.num_workers} workers{shared} = {product}:"
            ' write "auto" for one of the three'
        )


def _complete_precision(full: Config, dtype: Dtype) -> None:
    for name in ("bf16", "fp16"):
        section = full.get(name)
        if section is None and name == dtype:
            section = full[name] = {}
        if section is not None:
            _fill(section, "enabled", name == dtype, absent=name == dtype)


def _complete_zero(section: Config, hidden_size: int | None) -> None:
    for name, value in _bucket_sizes(hidden_size).items():
        _fill(section, name, value)
        _fill(section, f"stage3_{name}", value)
    for name in ("gather_16bit_weights", "stage3_gather_16bit_weights", "stage3_gather_fp16_weights"):
        _fill(section, f"{name}_on_model_save", False)


def _bucket_sizes(hidden_size: int | None) -> dict[str, int]:
    """Hugging Face's formulas, with a floor for small models; without a hidden size, DeepSpeed's defaults."""
    area = None if hidden_size is None else max(hidden_size * hidden_size, LEAST_AREA)
    return {
        "reduce_bucket_size": 500_000_000 if area is None else area,
        "prefetch_bucket_size": 50_000_000 if area is None else int(0.9 * area),
        "param_persistence_threshold": 100_000 if hidden_size is None else 10 * hidden_size,
    }


def _complete_optimizer(full: Config, asked: Asked) -> None:
    section = full.setdefault("optimizer", {"type": "AdamW"})
    params = section.setdefault("params", {})
    is_adam = section["type"].lower() in ("adam", "adamw")
    # Left out, lr would be the optimizer's own default and the recipe's would have no effect.
    _fill(params, "lr", asked.learning_rate, absent=True)
    _fill(params, "betas", list(asked.betas), absent=is_adam)
    _fill(params, "eps", asked.eps, absent=is_adam)
    _fill(params, "weight_decay", asked.weight_decay, absent=is_adam)
    # DeepSpeed's fused Adam is a CUDA kernel; on CPUs it has one only for an offloaded optimizer.
    is_here = asked.device == "cpu" and offload.place(full, "offload_optimizer") == "none"
    if is_adam and is_here and params.setdefault("torch_adam", True) is True:
        # Torch's own has one: one pass over the states, without temporaries.
        params.setdefault("fused", True)


def _complete_scheduler(section: Config, asked: Asked) -> None:
    if not section.get("type"):
        return
    params = section.setdefault("params", {})
    _fill(params, "warmup_min_lr", 0)
    _fill(params, "warmup_max_lr", asked.learning_rate)
    # DeepSpeed refuses a warm-up of 0 steps.
    _fill(params, "warmup_num_steps", max(1, asked.warmup_steps))
    _fill(
        params,
        "total_num_steps",
        asked.num_steps,
        absent=section["type"] in ("WarmupDecayLR", "WarmupCosineLR"),
    )


def _fill(section: Config, key: str, value: Any, *, absent: bool = False) -> None:
    if section.get(key) == "auto" or (absent and key not in section):
        section[key] = value


def _plain(config: Mapping[str, Any]) -> Config:
    """A deep copy without comments, and with bf16 under its present name."""

    def without_comments(section: Mapping[str, Any]) -> Config:
        return {
            key: without_comments(value) if isinstance(value, Mapping) else copy.deepcopy(value)
            for key, value in section.items()
            if not _is_comment(key)
        }

    plain = without_comments(config)
    old = plain.pop("bfloat16", None)
    if old is not None and plain.get("bf16") is None:
        plain["bf16"] = old
    return plain


def _is_comment(key: str) -> bool:
    return key.startswith(("_comment", "//"))


def _enabled(config: Config, value: bool) -> set[str]:
    return {name for name in ("fp16", "bf16") if _at(config, f"{name}.enabled") is value}


def _at(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _fixed(config: Mapping[str, Any], path: str) -> Any:
    value = _at(config, path)
    return None if value == "auto" else value


def _refuse_auto(config: Mapping[str, Any], where: str, filled: frozenset[str]) -> None:
    for path in _autos(config, ""):
        if path not in filled and not path.startswith(ds_keys.OWN_AUTO):
            raise DsConfigError(
                f'{where}: {path} is "auto", and nothing decides it: write a value, or leave it out'
            )


def _autos(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto" and not _is_comment(key):
            yield prefix + key


def _show(value: Any) -> str:
    return json.dumps(value)
