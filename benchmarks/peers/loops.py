"""Contenders that run under torchrun: Hugging Face's Trainer with DeepSpeed, and a bare DeepSpeed loop.

    torchrun --nproc_per_node 2 benchmarks/peers/loops.py WORK.json KIND STAGE STEPS OUT.json

KIND is trainer, trainer-grouped, trainer-max, loop or loop-ours. OUT gets, of rank 0, for each step the seconds, and of
all ranks together the tokens (padding apart) and slots, and the losses.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

from peers import work as works


class Record:
    """Steps as they are made: when, and how many tokens and slots on this rank."""

    def __init__(self) -> None:
        self.ended, self.tokens, self.slots = [time.perf_counter()], [0], [0]
        self.losses: list[float] = []

    def see(self, batch: dict[str, torch.Tensor]) -> None:
        """Count a micro-batch."""
        self.tokens[-1] += int(batch["attention_mask"].sum())
        self.slots[-1] += batch["input_ids"].numel()

    def step(self) -> None:
        """Note that a step is done."""
        self.ended.append(time.perf_counter())
        self.tokens.append(0)
        self.slots.append(0)

    def write(self, path: str) -> None:
        """Add up over the ranks and write, on rank 0."""
        counts = torch.tensor([self.tokens[:-1], self.slots[:-1]])
        dist.all_reduce(counts)
        if dist.get_rank() == 0:
            seconds = np.diff(self.ended).tolist()
            tree = {"seconds": seconds, "tokens": counts[0].tolist(), "slots": counts[1].tolist()}
            Path(path).write_text(json.dumps(tree | {"losses": self.losses}))


class Samples(torch.utils.data.Dataset):
    """The samples of the work, for the Trainer."""

    def __init__(self, work: works.Work) -> None:
        file = np.load(work.samples)
        self.ids, self.labels, self.bounds = file["ids"], file["labels"], file["bounds"]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, last = self.bounds[index], self.bounds[index + 1]
        return {"input_ids": self.ids[first:last], "labels": self.labels[first:last], "length": last - first}


def collate(work: works.Work, length: int | None = None) -> Any:
    """Return what pads samples to the longest among them, or to a length."""

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        tree = {
            "input_ids": works.pad(ids, work.pad_token_id, length),
            "labels": works.pad([row["labels"] for row in rows], -100, length),
            "attention_mask": works.pad([np.ones(len(each), dtype=np.int64) for each in ids], 0, length),
        }
        return {name: torch.from_numpy(values) for name, values in tree.items()}

    return padded


def model_of(work: works.Work) -> Any:
    """The model, the same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**work.model))


def trainer(work: works.Work, kind: str, stage: int, steps: int, record: Record) -> None:
    """Hugging Face's Trainer, as its documentation has it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                record.losses.append(logs["loss"])

    pad = collate(work, works.MAX_LENGTH if kind == "trainer-max" else None)

    def counted(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(rows)
        record.see(batch)
        return batch

    arguments = TrainingArguments(
        output_dir=f"{work.folder}/trainer",
        per_device_train_batch_size=works.MICRO_BATCH,
        max_steps=steps,
        learning_rate=works.LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=works.ds_config(stage),
        train_sampling_strategy="group_by_length" if kind == "trainer-grouped" else "random",
        length_column_name="length",
        seed=1,
    )
    it = Trainer(
        model=model_of(work),
        args=arguments,
        train_dataset=Samples(work),
        data_collator=counted,
        callbacks=[Watch()],
    )
    record.__init__()  # type: ignore[misc]  # The set-up is not part of a step.
    it.train()


def loop(work: works.Work, kind: str, stage: int, steps: int, record: Record) -> None:
    """A bare DeepSpeed loop: on samples as they come, padded; or on the launcher's batches."""
    import deepspeed

    model = model_of(work)
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=works.ds_config(stage)
    )[0]
    batches = ours(work, steps) if kind == "loop-ours" else padded(work, steps)
    record.__init__()  # type: ignore[misc]
    for micro_batches in batches:
        for batch in micro_batches:
            record.see(batch)
            loss = engine(**batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        record.losses.append(float(loss))
        record.step()


def padded(work: works.Work, steps: int) -> Any:
    """Batches of samples drawn at random."""
    samples, pad = Samples(work), collate(work)
    order = np.random.default_rng(1).permutation(len(samples))
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        rows = order[(step * size + rank) * works.MICRO_BATCH :][: works.MICRO_BATCH]
        yield [pad([samples[int(row)] for row in rows])]


def ours(work: works.Work, steps: int) -> Any:
    """The launcher's batches for this rank, as its workers get them."""
    from peers.feeding import feed_of

    feed = feed_of(work, dist.get_rank(), dist.get_world_size())
    for step in range(1, steps + 1):
        yield [
            {name: torch.from_numpy(values) for name, values in each.features.items()}
            for each in feed.step(step).micro_batches
        ]


def main() -> None:
    """Run one contender on this rank."""
    path, kind, stage, steps, out = sys.argv[1:]
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    work, record = works.load(path), Record()
    run = loop if kind.startswith("loop") else trainer
    run(work, kind, int(stage), int(steps), record)
    record.write(out)
    dist.barrier()


if __name__ == "__main__":
    main()
