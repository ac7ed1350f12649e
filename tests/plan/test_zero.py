"""The ds config: keys checked by name, "auto" filled in, contradictions with the recipe refused."""

import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DsConfigError
from launcher.plan import ds_keys, zero

SHIPPED = Path(__file__).parents[2] / "ds_configs"
ASKED = zero.Asked(
    micro_batch=4,
    accumulation=3,
    num_workers=2,
    global_batch=20,
    learning_rate=5e-5,
    betas=(0.9, 0.95),
    eps=1e-6,
    weight_decay=0.1,
    gradient_clipping=0.5,
    dtype="bf16",
    schedule="linear",
    warmup_steps=0,
    num_steps=100,
    hidden_size=64,
    device="cuda",
    written=frozenset(),
)
HF_AUTO: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def asked(*written: str, **changes: Any) -> zero.Asked:
    return dataclasses.replace(ASKED, written=frozenset(written), **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n}', "line 3, column 1"),
        ("[1]", "a ds config is a JSON object, this is a list"),
        ('{"fp16": {"enabled": true, "enabled": false}}', '"enabled" is there twice'),
    ],
)
def test_load_refuses(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(DsConfigError, match=str(path)) as error:
        zero.load(str(path))
    assert message in str(error.value)


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DsConfigError, match=r"none\.json: cannot read the ds config: No such file"):
        zero.load(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_cliping": 1.0}, 'unknown key "gradient_cliping" (did you mean "gradient_clipping"?)'),
        (
            {"zero_optimization": {"reduce_buckets_size": 1}},
            'unknown key "zero_optimization.reduce_buckets_size" (did you mean "reduce_bucket_size"?)',
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            'unknown key "zero_optimization.offload_param.devise" (did you mean "device"?)',
        ),
        ({"overlap_comm": True}, 'unknown key "overlap_comm": "overlap_comm" belongs in "zero_optimization"'),
        (
            {"zero_optimization": {"gradient_clipping": 1.0}},
            'unknown key "zero_optimization.gradient_clipping": "gradient_clipping" belongs at the top',
        ),
        ({"fp16": {"enable": True}}, '"fp16.enable" (did you mean "enabled"?)'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 5}}},
            'unknown key "scheduler.params.total_num_steps"',
        ),
        ({"scheduler": {"type": "WarmUpLR"}}, 'unknown scheduler.type "WarmUpLR" (did you mean "WarmupLR"?)'),
        ({"optimizer": {"type": "AdemW"}}, 'unknown optimizer.type "AdemW" (did you mean "AdamW"?)'),
        ({"optimizer": {"params": {}}}, "optimizer has no type"),
        ({"elasticity": {"enabled": True}}, 'DeepSpeed removed "elasticity": write train_batch_size'),
        ({"sparse_gradients": True}, 'DeepSpeed removed "sparse_gradients"'),
        ({"zero_optimization": {"mics_shard_size": 4}}, 'removed "zero_optimization.mics_shard_size"'),
        (
            {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}},
            'removed "optimizer.params.max_grad_norm": write gradient_clipping, at the top',
        ),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage is "2": it must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": True}, 'zero_optimization is true: it must be an object: write {"stage": 1}'),
        ({"zero_optimization": {"overlap_comm": "true"}}, 'is "true": it must be true or false'),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, 'is "5e8": it must be a whole number above 0'),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "is 0.5: it must be a whole number above 0"),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            'is "gpu": it must be one of "none", "cpu", "nvme"',
        ),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping is "1.0": it must be a number'),
        ({"gradient_clipping": None}, "gradient_clipping is null: it must be a number"),
        ({"train_batch_size": 0}, "train_batch_size is 0: it must be a whole number above 0"),
        ({"fp16": None}, "fp16 is null: it must be an object"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true: choose one"),
        ({"fp16": {"enabled": True}, "bfloat16": {"enabled": True}}, "both true: choose one"),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
            "optimizer.params.betas is [0.9]: it must be two numbers",
        ),
        ({"gradient_allreduce_op": "SUM"}, 'gradient_allreduce_op is "SUM": only "mean" can run here'),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false: only true"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2: only 0 or 1"),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
            'zero_optimization.allgather_bucket_size is "auto", and nothing decides it',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"torch_adam": "auto"}}},
            'optimizer.params.torch_adam is "auto", and nothing decides it',
        ),
    ],
)
def test_check_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DsConfigError) as error:
        zero.check(config, "x.json")
    text = str(error.value)
    assert text.startswith("x.json: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "config",
    [
        {},
        HF_AUTO,
        {"_comment": "mine", "// note": 1, "fp16": {"_comment1": ["x"], "//": "auto"}},
        {"zero_optimization": {"stage": 3, "offload_param": None, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {"zero_optimization": {"zenflow": {"select_interval": "auto", "select_strategy": "auto"}}},
        {"bfloat16": {"enabled": True}, "communication_data_type": "FP32"},
        {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}}},
        {"optimizer": {"type": "adamW", "params": {"lr": 1e-3, "adam_w_mode": True}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": [1e-4, 1e-5], "cycle_max_lr": 1e-3}}},
        {"data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"}},
        {"autotuning": {"enabled": False, "any": "auto"}, "pipeline": {"stages": "auto"}},
    ],
)
def test_check_allows_and_given_reads(config: dict[str, Any]) -> None:
    zero.check(config, "x.json")
    zero.given(config)
    zero.complete(config, ASKED)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, zero.Given()),
        (HF_AUTO, zero.Given(scheduler="WarmupDecayLR", zero_stage=3)),
        (
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 1.0,
                "fp16": {"enabled": True},
                "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8}},
            },
            zero.Given(
                train_batch_size=64,
                micro_batch=8,
                accumulation=4,
                gradient_clipping=1.0,
                dtype="fp16",
                learning_rate=1e-3,
                betas=(0.9, 0.99),
                eps=1e-8,
            ),
        ),
        ({"bfloat16": {"enabled": True}}, zero.Given(dtype="bf16")),
        ({"bf16": {"enabled": False}}, zero.Given(disabled=frozenset({"bf16"}))),
        (
            {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
            zero.Given(dtype="fp32", disabled=frozenset({"bf16", "fp16"})),
        ),
    ],
)
def test_given(config: dict[str, Any], expected: zero.Given) -> None:
    assert zero.given(config) == expected
    assert zero.given(config).has_scheduler == ("scheduler" in config)


@pytest.mark.parametrize(
    ("config", "wish", "message"),
    [
        (
            {"train_batch_size": 64},
            asked("global_batch", global_batch=32),
            "x.json: train_batch_size is 64, but the recipe's stages.source.global_batch is 32:"
            ' make them equal, or write "auto" in the ds config',
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            asked("micro_batch"),
            "train_micro_batch_size_per_gpu is 8, but the recipe's stages.source.micro_batch is 4",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}},
            asked("betas"),
            "optimizer.params.betas is [0.9, 0.99], but the recipe's stages.source.betas is [0.9, 0.95]",
        ),
        (
            {"gradient_clipping": 1.0},
            asked("gradient_clipping"),
            "gradient_clipping is 1.0, but the recipe's stages.source.gradient_clipping is 0.5",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {}}},
            asked("schedule"),
            'scheduler.type is "WarmupCosineLR", but the recipe\'s stages.source.schedule is "linear"',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
            asked("warmup", warmup_steps=7),
            "warmup_num_steps is 10, but the recipe's stages.source.warmup comes to 7 steps",
        ),
        (
            {"bf16": {"enabled": True}},
            asked("dtype", dtype="fp32"),
            "bf16.enabled is true, but the recipe's model.dtype is fp32",
        ),
        (
            {"bf16": {"enabled": False}},
            asked(),
            "bf16.enabled is false, but the recipe's model.dtype comes to",
        ),
        ({}, asked("dtype", dtype="fp16", device="cpu"), "fp16 does not run on CPUs"),
        (
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 2,
            },
            asked(),
            "train_batch_size is 64, but train_micro_batch_size_per_gpu 8 x"
            " gradient_accumulation_steps 2 x 2 workers = 32",
        ),
    ],
)
def test_contradictions(config: dict[str, Any], wish: zero.Asked, message: str) -> None:
    with pytest.raises(DsConfigError) as error:
        zero.contradictions(zero.given(config), wish, "x.json", "source")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "wish"),
    [
        ({}, asked(*ds_keys.OPTIMIZER_PARAMS)),
        ({"train_batch_size": 64}, asked()),
        ({"train_batch_size": 20}, asked("global_batch")),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, asked("betas")),
        ({"scheduler": {"type": "WarmupDecayLR"}}, asked("schedule")),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 1}}}, asked("warmup")),
        ({"fp16": {"enabled": False}}, asked("dtype")),
        (HF_AUTO, asked("global_batch", "learning_rate", "dtype", "schedule", "warmup")),
    ],
)
def test_no_contradiction(config: dict[str, Any], wish: zero.Asked) -> None:
    zero.contradictions(zero.given(config), wish, "x.json", "source")


def test_complete_fills_every_auto_and_changes_nothing_else() -> None:
    before = copy.deepcopy(HF_AUTO)
    full = zero.complete(HF_AUTO, ASKED)
    assert before == HF_AUTO
    assert full == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 5e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": 5e-5,
                "warmup_num_steps": 1,
                "total_num_steps": 100,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": 4096 * 4096,
            "stage3_prefetch_bucket_size": int(0.9 * 4096 * 4096),
            "stage3_param_persistence_threshold": 640,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "steps_per_print": 2000,
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(
    ("config", "wish", "path", "value"),
    [
        ({}, asked(), "optimizer.type", "AdamW"),
        ({}, asked(), "optimizer.params.torch_adam", None),
        ({}, asked(device="cpu"), "optimizer.params.torch_adam", True),
        ({}, asked(device="cpu"), "optimizer.params.fused", True),
        ({}, asked(), "optimizer.params.fused", None),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}, asked(device="cpu"),
         "optimizer.params.fused", None),
        ({"optimizer": {"type": "Adam", "params": {"fused": False}}}, asked(device="cpu"),
         "optimizer.params.fused", False),
        ({}, asked(), "bf16.enabled", True),
        ({}, asked(dtype="fp32"), "bf16", None),
        ({}, asked(), "steps_per_print", zero.NEVER),
        ({"_comment": "x", "bf16": {"//": 1}}, asked(), "bf16", {"enabled": True}),
        ({"bfloat16": {"enabled": "auto"}}, asked(dtype="fp32"), "bf16.enabled", False),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, asked(hidden_size=None),
         "zero_optimization.reduce_bucket_size", 500_000_000),
        ({"zero_optimization": {"prefetch_bucket_size": "auto"}}, asked(),
         "zero_optimization.prefetch_bucket_size", 15_099_494),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, asked(hidden_size=8192),
         "zero_optimization.reduce_bucket_size", 8192 * 8192),
        ({"zero_optimization": {"param_persistence_threshold": "auto"}}, asked(hidden_size=16384),
         "zero_optimization.param_persistence_threshold", 163_840),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, asked(device="cpu"),
         "optimizer.params.torch_adam", None),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, asked(device="cpu"),
         "optimizer.params.torch_adam", True),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, asked(device="cpu"),
         "optimizer.params.torch_adam", None),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}, asked(device="cpu"),
         "optimizer.params.torch_adam", False),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, asked(), "optimizer.params.lr", 1e-3),
        ({"optimizer": {"type": "SGD"}}, asked(), "optimizer.params", {"lr": 5e-5}),
        ({"scheduler": {"type": "WarmupCosineLR"}}, asked(), "scheduler.params", {"total_num_steps": 100}),
        ({"gradient_clipping": 1.0}, asked(), "gradient_clipping", 1.0),
        ({"train_batch_size": 20}, asked(), "train_batch_size", 24),
    ],
)  # fmt: skip
def test_complete(config: dict[str, Any], wish: zero.Asked, path: str, value: Any) -> None:
    node: Any = zero.complete(config, wish)
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    assert node == value


def test_complete_refuses_an_auto_that_nothing_decides() -> None:
    with pytest.raises(DsConfigError, match=r'fp16\.loss_scale is "auto", and nothing decides it'):
        zero.complete({"fp16": {"loss_scale": "auto"}}, ASKED)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shipped_configs(stage: int, device: str) -> None:
    path = str(SHIPPED / f"zero{stage}.json")
    config = zero.load(path)
    zero.check(config, path)
    assert zero.zero_stage(config) == stage
    everything = asked("global_batch", "micro_batch", "learning_rate", "betas", "dtype", device=device)
    zero.contradictions(zero.given(config), everything, path, "source")
    assert '"auto"' not in json.dumps(zero.complete(config, everything))


class Asking(dict[str, Any]):
    """A dictionary that notes which keys a parser asks for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asking":
        return self


def differences(path: str, known: set[str], installed: set[str]) -> list[str]:
    return [f"{path}: DeepSpeed now has {key}" for key in sorted(installed - known)] + [
        f"{path}: DeepSpeed no longer has {key}" for key in sorted(known - installed)
    ]


def table(path: str) -> set[str]:
    node: Any = ds_keys.KEYS
    for key in filter(None, path.split(".")):
        node = node[key]
    return set(node)


def models() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero import config, offload_config
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {key: field.annotation for key, field in DeepSpeedMonitorConfig.model_fields.items()}
    return {
        "zero_optimization": config.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": config.DeepSpeedZeroLeafModuleConfig,
        "zero_optimization.zenflow": ZenFlowConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensor_parallel": TPTrainingConfig,
        "tensor_parallel.tp": TPConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "weight_quantization": WeightQuantConfig,
        **monitors,
    }


def parsed() -> dict[str, set[str]]:
    """What DeepSpeed's parser asks for: at the top (""), and in the sections without a model."""
    from deepspeed.runtime import config

    names = (
        "activation_checkpointing aio checkpoint data_types flops_profiler optimizer scheduler torch_autocast"
    )
    sections = {name: Asking() for name in names.split()}
    sections["optimizer"]["type"] = sections["scheduler"]["type"] = "x"
    sections["checkpoint"].update(writer=Asking(), parallel_write=Asking())
    sections["torch_autocast"].update(dtype="fp32", lower_precision_safe_modules=[])
    top = Asking({"train_batch_size": 1, "timers": Asking(), **sections})
    config.DeepSpeedConfig(top)
    # Read by `deepspeed.initialize`, and by the parser only where a process group exists.
    outside = {"data_parallel_size", "sequence_parallel_size"}
    return {
        **{name: section.asked for name, section in sections.items()},
        "checkpoint.writer": sections["checkpoint"]["writer"].asked,
        "": top.asked - set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | outside,
    }


def test_the_table_is_what_the_installed_deepspeed_knows() -> None:
    found: list[str] = []
    for path, model in models().items():
        names = {name for key, field in model.model_fields.items() for name in (key, field.alias or key)}
        found += differences(path, table(path), names)
    for path, installed in parsed().items():
        found += differences(path or "top", table(path), installed)
    assert found == []


def test_the_removed_keys_are_those_that_the_installed_deepspeed_refuses() -> None:
    from deepspeed.runtime import config

    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | {"optimizer.params.max_grad_norm"}
    removed |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert differences("removed", set(ds_keys.REMOVED), removed) == []


def test_the_schedulers_and_optimizers_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config, lr_schedules

    found = differences("schedulers", set(ds_keys.SCHEDULERS), set(lr_schedules.VALID_LR_SCHEDULES))
    for name, known in ds_keys.SCHEDULERS.items():
        arguments = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        found += differences(name, set(known), arguments - {"optimizer"})
    found += differences("optimizers", set(ds_keys.DEEPSPEED_OPTIMIZERS), set(config.DEEPSPEED_OPTIMIZERS))
    assert found == []


def test_the_optimizers_are_those_of_torch() -> None:
    from torch import optim

    names = {name for name, value in vars(optim).items() if inspect.isclass(value)} - {"Optimizer"}
    assert differences("torch.optim", set(ds_keys.TORCH_OPTIMIZERS), names) == []


def test_the_defaults_for_auto_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    auto = {
        key: "auto" for key in ("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold")
    }
    full = zero.complete({"zero_optimization": auto}, asked(hidden_size=None))
    assert full["zero_optimization"] == {key: getattr(DeepSpeedZeroConfig(), key) for key in auto}


def test_neither_torch_nor_deepspeed_is_imported() -> None:
    code = "import sys, launcher.plan.zero; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    root = Path(zero.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
