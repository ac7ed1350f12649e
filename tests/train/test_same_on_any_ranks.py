"""Evaluation of all tasks by real engines on 1, 2 and 3 ranks: the same metrics to the last digit."""

import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.split import Split
from launcher.data.store import Store
from tests.conftest import (
    NOUNS,
    VERBS,
    chat_rows,
    free_port,
    join_ranks,
    make_tokenizer,
    write_jsonl,
)
from tests.tasks.words import word_piece
from tests.train import transfer_ranks as ranks
from tests.train.test_transfer import BERT, LLAMA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Ranks in a world, and the ZeRO stage there.
STAGES = {1: 0, 2: 3, 3: 1}
NUM_ROWS = {"labels": 23, "tags": 23, "answers": 11, "translation": 11, "chat": 11}
KEYS: dict[str, dict[str, Any]] = {
    # Micro-batches by their tokens, as by default.
    "labels": {"task": "text-classification", "max_length": 16},
    "tags": {
        "task": "token-classification",
        "head": {"kind": "crf", "constrained": True},
        "micro_batch": 3,
    },
    "answers": {
        "task": "question-answering",
        "answers": {"stride": 4, "unanswerable": True},
        "micro_batch": 3,
    },
    "translation": {
        "task": "translation",
        "generation": {"max_new_tokens": 6, "rouge": True},
        "micro_batch": 2,
    },
    "chat": {
        "task": "causal-lm",
        "generation": {"max_new_tokens": 4, "exact_match": True},
        "micro_batch": 2,
    },
}
PEOPLE, PLACES, OTHERS = (
    "ada karl mary".split(),
    "rome oslo bonn".split(),
    "sees likes the old road to from".split(),
)
WORDS = PEOPLE + PLACES + OTHERS


def labelled(draw: random.Random) -> dict[str, Any]:
    words = draw.choices(WORDS, k=draw.randint(1, 14))
    return {"text": " ".join(words), "label": draw.choice(["yes", "no", "perhaps"])}


def tagged(draw: random.Random) -> dict[str, Any]:
    words, tags = [], []
    for _ in range(draw.randint(1, 6)):
        kind, size = draw.choice(["O", "PER", "LOC"]), draw.randint(1, 2)
        words += draw.choices(WORDS, k=size)
        tags += ["O"] * size if kind == "O" else [f"B-{kind}", f"I-{kind}"][:size]
    return {"tokens": words, "tags": tags}


def asked(draw: random.Random) -> dict[str, Any]:
    words = draw.choices(WORDS, k=draw.randint(3, 99))
    first = draw.randrange(len(words))
    said = " ".join(words[first : first + draw.randint(1, 5)])
    start = len(" ".join([*words[:first], ""]))
    gold = (
        {"text": [said], "answer_start": [start]} if draw.random() < 0.8 else {"text": [], "answer_start": []}
    )
    return {"question": " ".join(draw.choices(WORDS, k=4)), "context": " ".join(words), "answers": gold}


def translated(draw: random.Random) -> dict[str, Any]:
    source, target = (" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(2))
    return {"source": source, "target": target}


def chatted(draw: random.Random) -> dict[str, Any]:
    return chat_rows(1, draw.randrange(1000))[0]


MAKERS = {
    "labels": labelled,
    "tags": tagged,
    "answers": asked,
    "translation": translated,
    "chat": chatted,
}


def cases(folder: Path, num_rows: dict[str, int] = NUM_ROWS, num_times: int = 1) -> dict[str, ranks.Case]:
    """One case for each task: a tiny random model, and data prepared as a run prepares them.

    Args:
        folder: of all files.
        num_rows: of the cases wanted.
        num_times: how often the eval split holds each row.
    """
    folder.mkdir(exist_ok=True)
    draw = random.Random(11)
    word_piece(folder, [" ".join(WORDS)], 120).save_pretrained(folder / "bert")
    rows = {name: [MAKERS[name](draw) for _ in range(count)] for name, count in num_rows.items()}
    texts = [" ".join(["", *WORDS, *NOUNS, *VERBS])] * 9
    own = str(make_tokenizer(folder / "own", texts, 400))
    (word,) = AutoTokenizer.from_pretrained(own).encode(" road")
    bert = {"config": BERT | {"initializer_range": 0.5}, "tokenizer": str(folder / "bert")}
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    # An untrained T5 repeats what it starts with: let that be a word.
    t5 |= {"decoder_start_token_id": word, "pad_token_id": 0, "eos_token_id": 2}
    models = dict.fromkeys(("labels", "tags", "answers"), bert) | {
        "translation": {"config": t5, "tokenizer": own},
        "chat": {"config": LLAMA | {"initializer_range": 0.5}, "tokenizer": own},
    }
    return {name: case(folder, name, models[name], rows[name], num_times) for name in num_rows}


def case(folder: Path, name: str, model: dict, rows: list[dict], num_times: int) -> ranks.Case:
    paths = [str(write_jsonl(folder / f"{name}.{n}.jsonl", rows * n)) for n in (1, num_times)]
    stage = {"name": name, "data": {"train": paths[0], "eval": paths[1]}, "max_length": 64} | KEYS[name]
    return ranks.case(name, "", 0, {"model": model | {"dtype": "fp32"}, "stages": [stage]}, folder)


def start(function: Any, num_ranks: int, *args: Any) -> None:
    """Call `function(rank, num_ranks, port, *args)` in as many processes, and wait for their end.

    They come from a server that has imported what takes seconds, once.
    """
    multiprocessing.set_forkserver_preload(
        ["torch", "transformers", "deepspeed", "tests.train.transfer_ranks"]
    )
    torch.multiprocessing.start_processes(
        function, (num_ranks, free_port(), *args), nprocs=num_ranks, start_method="forkserver"
    )


def run(num_ranks: int, asked_for: list[ranks.Case], out: Path) -> list[dict[str, Any]]:
    """Evaluate all cases in one start of that many ranks; return what each rank found, by case."""
    start(_rank, num_ranks, asked_for, str(out))
    return [torch.load(out / f"{num_ranks}-{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, port: int, asked_for: list[ranks.Case], out: str) -> None:
    join_ranks(rank, num_ranks, port)
    found = {each.name: evaluated(each, rank, num_ranks) for each in asked_for}
    torch.save(found, Path(out) / f"{num_ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


def evaluated(case: ranks.Case, rank: int, num_ranks: int) -> dict[str, Any]:
    """Evaluate as a stage does; return the metrics, and the samples of each batch of this rank."""
    from launcher.assembly import assemble

    context = ranks.context_of(case, rank, num_ranks)
    built = assemble(context, context.plan.stages[0])
    samples = [batch.samples.tolist() for batch in built.parts[0].eval_batches()]
    metrics = built.engine.evaluate(0, built.parts[0].eval_batches())
    built.engine.close()
    return {"metrics": metrics, "samples": samples}


@pytest.fixture(scope="module")
def of_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ranks.Case]:
    return cases(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def worlds(
    of_tasks: dict[str, ranks.Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks what each rank found."""
    out = tmp_path_factory.mktemp("found")
    return {
        num_ranks: run(num_ranks, [replace(each, stage=stage) for each in of_tasks.values()], out)
        for num_ranks, stage in STAGES.items()
    }


@pytest.mark.parametrize("name", NUM_ROWS)
def test_every_sample_is_judged_once(worlds: dict, of_tasks: dict, name: str) -> None:
    split = Split([Store(Path(path)) for path in of_tasks[name].prepared.facts[0].eval.stores])
    everything = sorted(split.all_samples().tolist())
    assert len(everything) >= NUM_ROWS[name]
    for num_ranks, found in worlds.items():
        batches = [rank[name]["samples"] for rank in found]
        assert sorted(i for own in batches for batch in own for i in batch) == everything
        assert len({len(own) for own in batches}) == 1, "ranks would wait for each other"
        assert num_ranks == 1 or len({sum(map(len, own)) for own in batches}) > 1, "the case divides evenly"


@pytest.mark.parametrize("name", NUM_ROWS)
def test_metrics_are_the_same_to_the_last_digit(worlds: dict, name: str) -> None:
    alone = worlds[1][0][name]["metrics"]
    print(name, alone)
    for num_ranks, found in worlds.items():
        for rank in found:
            assert rank[name]["metrics"] == alone, f"{num_ranks} ranks, ZeRO-{STAGES[num_ranks]}"


def test_the_metrics_tell_something(worlds: dict) -> None:
    found = {name: told["metrics"] for name, told in worlds[1][0].items()}
    for name, metric in (
        ("labels", "accuracy"),
        ("tags", "f1"),
        ("answers", "f1"),
        ("translation", "rouge1"),
        ("translation", "chrf"),
    ):
        assert 0 < found[name][metric] < (100 if metric == "chrf" or name == "answers" else 1), (name, metric)
