"""A run as Ray Train's and DeepSpeed's guides have it, to its first steps; for benchmarks/startup.py.

python benchmarks/stock_start.py FOLDER RUN.json

RUN.json: model (a config), tokenizer (a directory), train (a JSONL file of chats), ds (a DeepSpeed config), workers,
batch, max_length, steps.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def train(run: dict[str, Any]) -> None:
    """Train, as each worker does."""
    begun = {"until the train function": time.time()}
    import deepspeed
    import ray.train
    import torch
    from datasets import load_dataset
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    begun["imports in the workers"] = time.time()
    context = ray.train.get_context()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(run["tokenizer"])

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [
            "".join(f"{each['role']}: {each['content']}\n" for each in chat) for chat in rows["messages"]
        ]
        ids = tokenizer(texts, truncation=True, max_length=run["max_length"])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    data = load_dataset("json", data_files=run["train"], split="train", cache_dir=f"{run['folder']}/cache")
    data = data.map(tokenize, batched=True, remove_columns=data.column_names)
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, context.get_world_size(), context.get_world_rank(), seed=0
    )
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=run["batch"], sampler=sampler, collate_fn=DataCollatorForSeq2Seq(tokenizer)
    )
    begun["preparing the data"] = time.time()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**run["model"]))
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=run["ds"])[0]
    begun["building the model and engine"] = time.time()
    for step, batch in enumerate(loader):
        engine.backward(engine(**batch, use_cache=False).loss)
        engine.step()
        if step == 0 and context.get_world_rank() == 0:
            begun["the first step"] = time.time()
            Path(run["folder"], "begun.json").write_text(json.dumps(begun), encoding="utf-8")
        if step + 1 == run["steps"]:
            break
    ray.train.report({"loss": 0.0})


def main(folder: Path, run: dict[str, Any]) -> None:
    """Run it on CPU workers."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        train,
        train_loop_config=run | {"folder": str(folder)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=run["workers"]),
        run_config=ray.train.RunConfig(
            storage_path=str(folder),
            name="stock",
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}},
        ),
    ).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
