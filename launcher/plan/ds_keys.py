"""The keys that DeepSpeed 0.19.8 knows, as data.

Derived from its source: the fields (and their aliases) of the pydantic models of zero, offload,
zenflow, precision, tensor parallelism, monitors, comms logger, compile, timers and hybrid engine;
for the sections that are plain dictionaries, and for the top level, every key that its parser asks
for; for the schedulers, the arguments of their constructors. `tests/plan/test_zero.py` repeats the
derivation on the installed version and names what an upgrade added or removed.

A value in `KEYS` is a closed section (a dictionary) or the kind of value, with `?` if null is
allowed: `bool`, `int`, `count` (above 0), `size` (0 or more), `number`, `numbers` (one or a list),
`text`, `list`, `stage`, `open` (an object of any keys), `any`, `=a|b` (one of these words), `~a|b`
(one of these, in any case).
"""

from collections.abc import Mapping

Keys = Mapping[str, "str | Keys"]

DEVICE = "=none|cpu|nvme"
DTYPE = "~fp32|fp16|bf16?"

OFFLOAD_PARAM: Keys = {
    "device": DEVICE,
    "nvme_path": "text?",
    "buffer_count": "size",
    "buffer_size": "size",
    "max_in_cpu": "size",
    "pin_memory": "bool",
}
OFFLOAD_OPTIMIZER: Keys = {
    "device": DEVICE,
    "nvme_path": "text?",
    "buffer_count": "size",
    "pin_memory": "bool",
    "pipeline_read": "bool",
    "pipeline_write": "bool",
    "fast_init": "bool",
    "ratio": "number",
    "super_offload": "bool",
    "cpuadam_cores_perc": "number",
}
ZENFLOW: Keys = {
    "topk_ratio": "number",
    "select_strategy": "=auto|step|epoch",
    "select_interval": "int",
    "update_interval": "int",
    "overlap_step": "bool",
    "offload": "bool",
    "auto_ratio": "number",
    "full_warm_up_rounds": "int",
    "pt_reserved_cores_perc": "number",
    "steps_per_epoch": "int?",
}
ZERO: Keys = {
    "stage": "stage",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "count",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "size",
    "overlap_comm": "bool?",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "elastic_checkpoint": "bool",
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ZENFLOW,
    "sub_group_size": "size",
    "cpu_offload": "bool?",
    "cpu_offload_param": "bool?",
    "cpu_offload_use_pin_memory": "bool?",
    "prefetch_bucket_size": "size",
    "stage3_prefetch_bucket_size": "size",
    "param_persistence_threshold": "size",
    "stage3_param_persistence_threshold": "size",
    "model_persistence_threshold": "size",
    "stage3_model_persistence_threshold": "size",
    "max_live_parameters": "size",
    "stage3_max_live_parameters": "size",
    "max_reuse_distance": "size",
    "stage3_max_reuse_distance": "size",
    "gather_16bit_weights_on_model_save": "bool",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_gather_fp16_weights_on_model_save": "bool",
    "module_granularity_threshold": "int",
    "stage3_module_granularity_threshold": "int",
    "use_all_reduce_for_fetch_params": "bool",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "allgather_sequential": "bool",
    "stage3_allgather_sequential": "bool",
    "ignore_unused_parameters": "bool",
    "legacy_stage1": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "size",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "pipeline_loading_checkpoint": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
    "save_muon_momentum_buffer_in_memory": "bool",
    "leaf_module": {"classes": "any", "names": "any", "name_suffixes": "any"},
}
BF16: Keys = {
    "enabled": "bool",
    "immediate_grad_update": "bool",
    "check_grad_overflow": "bool",
    "bf16_master_weights_and_grads": "bool",
    "bf16_optimizer_states": "bool",
}
FP16: Keys = {
    "enabled": "bool",
    "auto_cast": "bool",
    "loss_scale": "number",
    "initial_scale_power": "size",
    "loss_scale_window": "count",
    "hysteresis": "int",
    "consecutive_hysteresis": "bool",
    "min_loss_scale": "size",
    "fp16_master_weights_and_grads": "bool",
}
TENSOR_PARALLEL_GROUP: Keys = {"tp_size": "count", "tp_grain_size": "count", "mpu": "any", "tp_group": "any"}
TENSOR_PARALLEL: Keys = {
    "dtype": "text",
    "autotp_size": "size",
    "tp_overlap_comm": "bool",
    "vocab_parallel_lm_head": "bool?",
    "vocab_parallel_ce_backend": "=torch|liger",
    "tensor_parallel": TENSOR_PARALLEL_GROUP,
    "tp": TENSOR_PARALLEL_GROUP,
    "injection_policy_tuple": "any",
    "partition_config": "open?",
    "preset_model": "text?",
    "keep_module_on_host": "bool",
    "replace_with_kernel_inject": "bool",
    "kernel_inject": "bool",
}
CHECKPOINT: Keys = {
    "tag_validation": "~warn|ignore|fail",
    "load_universal": "bool",
    "use_node_local_storage": "bool",
    "parallel_write": {"pipeline_stage": "bool"},
    "checkpoint_serialization": "bool",
    "writer": {
        "type": "~mock|python|fast",
        "io_buffer_size": "size",
        "io_buffer_double": "bool",
        "show_statistics": "bool",
        "data_parallel": "~replica|socket|machine?",
        "decoupled": "bool",
        "io_multiplier": "number",
    },
}
COMPILE: Keys = {
    "deepcompile": "bool",
    "autoep_non_moe": "bool",
    "free_activation": "bool",
    "free_activation_threshold": "int",
    "offload_activation": "bool",
    "offload_activation_pin_memory": "bool",
    "offload_opt_states": "bool",
    "double_buffer": "bool",
    "symmetric_memory": "bool",
    "debug_log": "bool",
    "offload_parameters": "bool",
    "sync_before_reduce": "bool",
    "sync_after_reduce": "bool",
    "sync_before_allgather": "bool",
    "sync_after_allgather": "bool",
    "keep_int_input_tensors": "bool",
    "keep_all_input_tensors": "bool",
    "passes": "list?",
}
COMET: Keys = {
    "enabled": "bool",
    "samples_log_interval": "int",
    "project": "text?",
    "workspace": "text?",
    "api_key": "text?",
    "experiment_name": "text?",
    "experiment_key": "text?",
    "online": "bool?",
    "mode": "text?",
}
SECTIONS: Keys = {
    "zero_optimization": ZERO,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "optimizer": {"type": "text", "params": "open", "legacy_fusion": "bool"},
    "scheduler": {"type": "text?", "params": "open"},
    "activation_checkpointing": {
        "partition_activations": "bool",
        "number_checkpoints": "any",
        "contiguous_memory_optimization": "bool",
        "synchronize_checkpoint_boundary": "bool",
        "profile": "bool",
        "cpu_checkpointing": "bool",
    },
    "aio": {
        "block_size": "count",
        "queue_depth": "count",
        "intra_op_parallelism": "count",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
    "checkpoint": CHECKPOINT,
    "comms_logger": {
        "enabled": "bool",
        "prof_all": "bool",
        "prof_ops": "list",
        "verbose": "bool",
        "debug": "bool",
    },
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "number",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "text?",
    },
    "data_types": {
        "grad_accum_dtype": "text?",
        "param_dtype": "text?",
        "buffer_dtype": "text?",
        "keep_in_fp32_modules": "list",
    },
    "torch_autocast": {"enabled": "bool", "dtype": "text", "lower_precision_safe_modules": "list"},
    "tensor_parallel": TENSOR_PARALLEL,
    "compile": COMPILE,
    "hybrid_engine": {
        "enabled": "bool",
        "max_out_tokens": "count",
        "inference_tp_size": "count",
        "release_inference_cache": "bool",
        "pin_parameters": "bool",
        "tp_gather_partition_size": "count",
        "enable_cuda_graph": "bool",
    },
    "timers": {"throughput": {"enabled": "bool", "synchronized": "bool"}},
    "tensorboard": {"enabled": "bool", "output_path": "text", "job_name": "text"},
    "wandb": {"enabled": "bool", "group": "text?", "team": "text?", "project": "text"},
    "csv_monitor": {"enabled": "bool", "output_path": "text", "job_name": "text"},
    "comet": COMET,
    "weight_quantization": {
        "enabled": "bool",
        "num_bits": "count",
        "q_type": "=asymmetric|symmetric",
        "q_groups": "count",
        "quantized_initialization": "open",
        "post_init_quant": "open",
    },
}
KEYS: Keys = {
    **SECTIONS,
    "train_batch_size": "count",
    "train_micro_batch_size_per_gpu": "count",
    "gradient_accumulation_steps": "count",
    "managed_gradient_accumulation": "bool",
    "gradient_clipping": "number",
    "steps_per_print": "number?",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "disable_allgather": "bool",
    "communication_data_type": DTYPE,
    "seq_parallel_communication_data_type": DTYPE,
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "~mean|sum",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "use_data_before_expert_parallelism": "bool",
    "sequence_parallel_size": "count",
    "data_parallel_size": "count",
    "dataloader_drop_last": "bool",
    "vocabulary_size": "size?",
    "log_level": "any",
    "autotuning": "open",
    "data_efficiency": "open",
    "datastates_ckpt": "any",
    "expert_parallel": "open",
    "pipeline": "open",
}

NULLABLE_SECTIONS = frozenset(
    {
        "aio",
        "bf16",
        "zero_optimization.offload_param",
        "zero_optimization.offload_optimizer",
        "zero_optimization.zenflow",
    }
)

SCHEDULERS: Mapping[str, Keys] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": "numbers",
        "lr_range_test_step_size": "count",
        "lr_range_test_step_rate": "number",
        "lr_range_test_staircase": "bool",
        "last_batch_iteration": "int",
    },
    "OneCycle": {
        "cycle_min_lr": "numbers",
        "cycle_max_lr": "numbers",
        "decay_lr_rate": "number",
        "cycle_first_step_size": "count",
        "cycle_second_step_size": "count?",
        "cycle_first_stair_count": "size",
        "cycle_second_stair_count": "size?",
        "decay_step_size": "size",
        "cycle_momentum": "bool",
        "cycle_min_mom": "numbers",
        "cycle_max_mom": "numbers",
        "decay_mom_rate": "number",
        "last_batch_iteration": "int",
    },
    "WarmupLR": {
        "warmup_min_lr": "numbers",
        "warmup_max_lr": "numbers",
        "warmup_num_steps": "count",
        "warmup_type": "=log|linear",
        "last_batch_iteration": "int",
    },
    "WarmupDecayLR": {
        "total_num_steps": "count",
        "warmup_min_lr": "numbers",
        "warmup_max_lr": "numbers",
        "warmup_num_steps": "count",
        "warmup_type": "=log|linear",
        "last_batch_iteration": "int",
    },
    "WarmupCosineLR": {
        "total_num_steps": "count",
        "warmup_min_ratio": "numbers",
        "warmup_num_steps": "count",
        "cos_min_ratio": "number",
        "warmup_type": "=log|linear",
        "last_batch_iteration": "int",
    },
}
"""By type, the parameters that its constructor takes."""

DEEPSPEED_OPTIMIZERS = frozenset(
    {"adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "muon", "musgd"}
)
"""Known in any case; every other name is taken from torch.optim as it is written."""

TORCH_OPTIMIZERS = frozenset(
    {
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    }
)

OPTIMIZER_PARAMS: Keys = {"lr": "number", "betas": "list", "eps": "number", "weight_decay": "number"}
"""What the recipe decides too; the rest belongs to the optimizer."""

_BATCHES = "write train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps"
REMOVED: Mapping[str, str] = {
    "nebula": "leave it out: the launcher saves checkpoints itself",
    "compression_training": "leave it out: the model would train unquantised",
    "amp": "leave it out, and write fp16 or bf16",
    "quantize_training": "leave it out",
    "sparse_gradients": "leave it out: nn.Embedding(sparse=True) needs no key",
    "eigenvalue": "leave it out",
    "sparse_attention": "leave it out, and choose the model's attention in the recipe (model.attention)",
    "elasticity": f'{_BATCHES} (or "auto"): the launcher keeps the global batch when workers come and go',
    "graph_harvesting": "leave it out",
    "curriculum_learning": "write data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": "leave it out",
    "zero_optimization.mics_shard_size": "write zero_hpz_partition_size to keep gathers inside a node",
    "zero_optimization.mics_hierarchical_params_gather": "leave it out",
    "zero_optimization.zeropp_loco_param": "leave it out, and keep zero_quantized_gradients",
    "optimizer.params.max_grad_norm": "write gradient_clipping, at the top",
}
"""What 0.19.8 refuses to start with, and what to do instead."""

FILLED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "sequence_parallel_size",
        "bf16.enabled",
        "bfloat16.enabled",
        "fp16.enabled",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.prefetch_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.param_persistence_threshold",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
    }
)
"""Where "auto" is a question that `zero.complete` answers."""

OWN_AUTO = (
    "autotuning.",
    "data_efficiency.",
    "datastates_ckpt.",
    "expert_parallel.",
    "pipeline.",
    "data_types.keep_in_fp32_modules",
    "zero_optimization.zenflow.select_strategy",
    "zero_optimization.zenflow.select_interval",
    "zero_optimization.zenflow.update_interval",
)
"""Where "auto" is a value of DeepSpeed's own, and stays."""

_DATA_PARALLEL = "the launcher gives every worker samples of its own (data parallelism with ZeRO)"
ONLY: Mapping[str, tuple[tuple[str | int | bool, ...], str]] = {
    "gradient_allreduce_op": (
        ("mean",),
        "the loss is normalised over the global batch, and counts on the mean over workers",
    ),
    "managed_gradient_accumulation": ((True,), "every micro-batch would become an optimizer step"),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed removed the old ZeRO 1"),
    "tensor_parallel.autotp_size": ((0, 1), _DATA_PARALLEL),
    "hybrid_engine.enabled": ((False,), "it is for generation inside RLHF"),
}
"""Keys that DeepSpeed reads, of which only some values can run here, and why."""
