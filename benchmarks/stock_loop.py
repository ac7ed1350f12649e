"""What Ray Train's and DeepSpeed's examples come to: a plain loop that checkpoints by both; for benchmarks/recovery.py.

python benchmarks/stock_loop.py FOLDER MODEL_CONFIG.json STEPS SAVE_EVERY
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """Train, as each worker does."""
    import deepspeed
    import ray.train
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config["model"]))
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config["ds"])[0]
    step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder)
            step = state["step"]
    while step < config["steps"]:
        tokens = torch.randint(0, config["model"]["vocab_size"], (2, 128))
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
        step += 1
        if rank == 0:
            with open(config["log"], "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, "time": time.time(), "pid": os.getpid()}) + "\n")
        if step % config["save_every"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder, client_state={"step": step})
                ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main(folder: Path, model: dict[str, Any], steps: int, save_every: int) -> None:
    """Run it on two CPU workers."""
    import ray
    import ray.train
    import ray.train.torch

    ray.init(address="local", num_cpus=2, log_to_driver=False)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ds = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={
            "model": model,
            "ds": ds,
            "steps": steps,
            "save_every": save_every,
            "log": str(folder / "steps.jsonl"),
        },
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            storage_path=str(folder),
            name="stock",
            failure_config=ray.train.FailureConfig(max_failures=9),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "PATH": path}},
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]), int(sys.argv[4]))
