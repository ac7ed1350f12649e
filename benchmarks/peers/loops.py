"""Contenders that run under torchrun: Hugging Face's Trainer with DeepSpeed, and a bare DeepSpeed loop.

    torchrun --nproc_per_node 2 benchmarks/peers/loops.py WORK.json KIND STAGE STEPS OUT.json

KIND is trainer, trainer-grouped, trainer-max, loop, loop-ours or stage (the launcher's stage without Ray). OUT gets, of
rank 0, for each step the seconds, and of all ranks together the processor's seconds, the tokens (padding apart) and
slots, and the losses; of the launcher's stage also how it began, and the seconds in collectives.
"""

import json
import math
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
    """Steps as they are made: when, how much of the processor, and how many tokens and slots on this rank."""

    def __init__(self, work: works.Work) -> None:
        self.work = work
        self.tally: Any = None
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self.ended, self.used = [time.perf_counter()], [time.process_time()]
        self.tokens, self.slots = [0], [0]
        self.waits: list[float] = []
        self.losses: list[float] = []
        self.begin: dict[str, Any] = {}

    def see(self, batch: dict[str, Any]) -> None:
        """Count a micro-batch."""
        tokens, slots = counted(self.work, batch)
        self.tokens[-1] += tokens
        self.slots[-1] += slots

    def step(self) -> None:
        """Note that a step is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())
        self.used.append(time.process_time())
        self.tokens.append(0)
        self.slots.append(0)

    def write(self, path: str) -> None:
        """Add up over the ranks and write, on rank 0."""
        sums = torch.tensor(
            [self.tokens[:-1], self.slots[:-1], np.diff(self.used).tolist()],
            dtype=torch.float64,
            device="cuda" if dist.get_backend() == "nccl" else "cpu",
        )
        dist.all_reduce(sums)
        if dist.get_rank() == 0:
            tree = dict(zip(("tokens", "slots", "cpu_seconds"), sums.tolist(), strict=True))
            tree |= {"seconds": np.diff(self.ended).tolist(), "losses": self.losses, "waits": self.waits}
            tree["begin"] = self.begin
            Path(path).write_text(json.dumps(tree))


def counted(work: works.Work, batch: dict[str, Any]) -> tuple[int, int]:
    """Return a micro-batch's tokens and slots; where answers are sequences of their own, theirs too."""
    tokens, slots = int(batch["attention_mask"].sum()), math.prod(batch["input_ids"].shape)
    labels = batch["labels"]
    if work.kind == "translation":
        return tokens + int((labels != -100).sum()), slots + math.prod(labels.shape)
    return tokens, slots


class Samples(torch.utils.data.Dataset):
    """The samples of the work, for the Trainer."""

    def __init__(self, work: works.Work) -> None:
        self.samples = works.samples_of(work)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return sample | {"length": len(sample["input_ids"])}


def collate(work: works.Work, length: int | None = None) -> Any:
    """Return what pads samples to the longest among them, or to a length."""
    fills = {"input_ids": work.pad_token_id, "labels": -100}

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        found = {"attention_mask": works.pad([np.ones(len(each), dtype=np.int64) for each in ids], 0, length)}
        for name in rows[0].keys() - {"length"}:
            values = [row[name] for row in rows]
            is_one = isinstance(values[0], int)
            found[name] = np.array(values) if is_one else works.pad(values, fills.get(name, 0), length)
        return {name: torch.from_numpy(values) for name, values in found.items()}

    return padded


def model_of(work: works.Work) -> Any:
    """The model, the same on every rank."""
    import transformers

    torch.manual_seed(0)
    auto_class = getattr(transformers, works.KINDS[work.kind].auto_model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.dtype]
    return auto_class.from_pretrained(work.start, dtype=dtype)


def trainer(work: works.Work, kind: str, stage: int, steps: int, record: Record) -> None:
    """Hugging Face's Trainer, as its documentation has it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                record.losses.append(logs["loss"])

    pad = collate(work, work.max_length if kind == "trainer-max" else None)

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(rows)
        record.see(batch)
        return batch

    arguments = TrainingArguments(
        output_dir=f"{work.folder}/trainer",
        per_device_train_batch_size=work.micro_batch,
        max_steps=steps,
        learning_rate=works.LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=work.device == "cpu",
        bf16=work.dtype == "bf16",
        disable_tqdm=True,
        deepspeed=works.ds_config(stage, work),
        train_sampling_strategy="group_by_length" if kind == "trainer-grouped" else "random",
        length_column_name="length",
        seed=1,
    )
    it = Trainer(
        model=model_of(work),
        args=arguments,
        train_dataset=Samples(work),
        data_collator=padded,
        callbacks=[Watch()],
    )
    record.start()  # The set-up is not part of a step.
    it.train()


def loop(work: works.Work, kind: str, stage: int, steps: int, record: Record) -> None:
    """A bare DeepSpeed loop: on samples as they come, padded; or on the launcher's batches."""
    import deepspeed

    model = model_of(work)
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=works.ds_config(stage, work)
    )[0]
    batches = ours(work, steps) if kind == "loop-ours" else padded(work, steps)
    record.start()
    for batch in batches:
        record.see(batch)
        batch = {name: values.to(engine.device) for name, values in batch.items()}
        loss = engine(**batch, **({"use_cache": False} if work.kind == "chats" else {})).loss
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
        rows = order[(step * size + rank) * work.micro_batch :][: work.micro_batch]
        yield pad([samples[int(row)] for row in rows])


def ours(work: works.Work, steps: int) -> Any:
    """The launcher's batches for this rank, as its workers get them."""
    from peers import stages

    batches = stages.part_of(work).batches
    for step in range(1, steps + 1):
        for each in batches.step(step).micro_batches:
            yield {name: torch.from_numpy(values) for name, values in each.features.items()}


def own_stage(work: works.Work, kind: str, stage: int, steps: int, record: Record) -> None:
    """The launcher's own stage, without Ray around it."""
    from peers import stages

    stages.run(work, stage, steps, record)


def main() -> None:
    """Run one contender on this rank."""
    path, kind, stage, steps, out = sys.argv[1:]
    work = works.load(path)
    if work.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    record = Record(work)
    if kind.startswith("stage"):
        from benchmarks.scaled.collectives import Tally

        record.tally = Tally()  # DeepSpeed keeps some of torch's collectives from its own import on.
    import deepspeed

    deepspeed.init_distributed("gloo" if work.device == "cpu" else "nccl")
    run = {"loop": loop, "trainer": trainer, "stage": own_stage}[kind.split("-")[0]]
    run(work, kind, int(stage), int(steps), record)
    record.write(out)
    dist.barrier()


if __name__ == "__main__":
    main()
