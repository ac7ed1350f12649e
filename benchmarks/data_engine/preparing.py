"""How fast rows become tokens: beside the bare tokenizer on one core, beside `datasets` on two."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data_engine import corpus
from benchmarks.data_engine.corpus import Corpus
from benchmarks.data_engine.measure import Figure, alternate, at_least, at_most, ratio, timed
from launcher import prepare as preparing
from launcher import recipe as recipes
from launcher import storage
from launcher.describe import Described, describe
from launcher.plan.plan import ModelFacts
from launcher.preparation import Preparation, make_all
from launcher.tasks import chat

MAX_LENGTH = 2048  # so that hardly a row is cut: all ways do the same work
ROWS_PER_CALL = 2048
FACTS = ModelFacts(max_positions=2048)
CORES = 2
ROUNDS_BESIDE_DATASETS = 3
START_ROUNDS = 3
START_MB = (100, 1000)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of data: a file, the stage that reads it, and its rows as the tokenizer sees them."""

    name: str
    file: Path
    task: str
    render: Callable[[list[dict[str, Any]]], list[str]]

    def recipe(self, model: Path, **more: Any) -> dict[str, Any]:
        """Return the recipe of a run on this file."""
        data: dict[str, Any] = {"train": str(self.file)}
        if self.task == "text-classification":
            data["labels"] = list(corpus.LABELS)
        stage = {"name": "a", "task": self.task, "max_length": MAX_LENGTH, "data": data, **more}
        return recipes.dump(recipes.parse({"model": {"path": str(model)}, "stages": [stage]}))


def prepare(text: Corpus, model: Path, folder: Path) -> list[Figure]:
    """Answer: how much of the tokenizer's own speed is left, and how much more it is than `datasets` gives."""
    figures: list[Figure] = []
    cases = _cases(text, model, folder)
    for case in cases:
        figures += _beside_tokenizer(case, model, folder)
    for case in cases[:2]:
        figures += _beside_datasets(case, model, folder)
    return figures


def start(text: Corpus, model: Path, folder: Path) -> list[Figure]:
    """Answer: how long until training can begin where the recipe gives the steps, by the size of the data."""
    with OnCores():
        cases = [
            Case(f"{size_mb} MB", _plain_file(text, folder, size_mb), "causal-lm", _texts)
            for size_mb in START_MB
        ]
        # What a worker imports for its first task is not what is asked here.
        _until_first_window(cases[0], model, folder)
        seconds = alternate(
            [lambda _, case=case: _until_first_window(case, model, folder) for case in cases], START_ROUNDS
        )
    for case in cases:
        case.file.unlink()
    medians = [statistics.median(each) for each in seconds]
    grown = ratio(seconds[-1], seconds[0])
    return [
        *(
            Figure(name=f"to the first window, {case.name} of text", value=value, unit="s")
            for case, value in zip(cases, medians, strict=True)
        ),
        at_most(f"{cases[-1].name} against {cases[0].name}", grown, "times", 1.2),
    ]


class OnCores:
    """A Ray cluster of two CPUs on this machine, for as long as it is asked for."""

    def __enter__(self) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()


def _cases(text: Corpus, model: Path, folder: Path) -> list[Case]:
    size_mb = sum(len(one) for one in text.texts) / 1e6
    talks = corpus.write_jsonl(folder / "chat.jsonl", lambda: corpus.chat_rows(text), round(size_mb * 1e6))
    return [
        Case("text, jsonl", _plain_file(text, folder, size_mb), "causal-lm", _texts),
        Case(
            "text, parquet",
            corpus.write_parquet(folder / "text.parquet", corpus.plain_rows(text)),
            "causal-lm",
            _texts,
        ),
        Case("chat, jsonl", talks, "causal-lm", _rendering(model)),
        Case(
            "classification, parquet",
            corpus.write_parquet(folder / "labelled.parquet", corpus.labelled_rows(text)),
            "text-classification",
            _texts,
        ),
    ]


def _plain_file(text: Corpus, folder: Path, size_mb: float) -> Path:
    file = folder / f"text-{size_mb:.0f}.jsonl"
    return corpus.write_jsonl(file, lambda: corpus.plain_rows(text), round(size_mb * 1e6))


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def _rendering(model: Path) -> Callable[[list[dict[str, Any]]], list[str]]:
    tokenizer = _tokenizer(model)
    tokenizer.chat_template = chat.template(None, None)
    render = chat.renderer(tokenizer)
    return lambda rows: [render(row["messages"], False) for row in rows]


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _described(case: Case, model: Path, store: Path, **more: Any) -> Described:
    described = describe(case.recipe(model, **more), FACTS, str(store))
    if not isinstance(described, Described):
        raise described
    return described


def _beside_tokenizer(case: Case, model: Path, folder: Path) -> list[Figure]:
    """Take chunk by chunk: the tokenizer on its texts in memory, then our preparation of it from the file."""
    store = folder / "store"
    job = _described(case, model, store).jobs[0]
    chunks = _texts_of_chunks(case, job)
    tokenizer = _tokenizer(model).backend_tokenizer
    made: dict[int, int] = {}

    def ours(number: int) -> None:
        made[number] = _good(preparing.make_chunk(job, number)).num_tokens

    def bare(number: int, encode: Callable[..., Any]) -> None:
        for i in range(0, len(chunks[number]), ROWS_PER_CALL):
            encode(chunks[number][i : i + ROWS_PER_CALL], add_special_tokens=False)

    ways = [
        ours,
        lambda number: bare(number, tokenizer.encode_batch),
        lambda number: bare(number, tokenizer.encode_batch_fast),
    ]
    for way in ways:  # the first chunk is for what is loaded and cached once
        way(0)
    taken = alternate([lambda n, way=way: timed(lambda: way(n + 1))[0] for way in ways], len(chunks) - 1)
    storage.delete(store)
    tokens = [made[number] for number in range(1, len(chunks))]
    wall = [[n / each.wall_s for n, each in zip(tokens, way, strict=True)] for way in taken]
    cpu = [[n / each.cpu_s for n, each in zip(tokens, way, strict=True)] for way in taken]
    named = f"{case.name}: "
    return [
        Figure(
            name=named + "ours, from file to block", value=statistics.median(wall[0]), unit="tokens/s/core"
        ),
        Figure(name=named + "bare encode_batch", value=statistics.median(wall[1]), unit="tokens/s/core"),
        Figure(name=named + "bare encode_batch_fast", value=statistics.median(wall[2]), unit="tokens/s/core"),
        # By CPU time: of the clock's, a busy machine takes more than the difference is.
        at_least(named + "ours / encode_batch, CPU time", ratio(cpu[0], cpu[1]), "", 0.9),
        Figure(name=named + "the same by the clock", value=ratio(wall[0], wall[1]), unit=""),
        Figure(name=named + "ours / encode_batch_fast, CPU time", value=ratio(cpu[0], cpu[2]), unit=""),
    ]


def _texts_of_chunks(case: Case, job: preparing.StoreJob) -> list[list[str]]:
    from launcher.data import source

    manifest = preparing.manifest_of(job.directory)
    chunks = source.chunks([file for file, *_ in manifest.files], manifest.chunk_bytes)
    name = "messages" if case.name.startswith("chat") else "text"
    return [
        [
            text
            for rows in source.read(chunk, [name], reject=source.refuse)
            for text in case.render([{name: value} for value in rows.columns[name]])
        ]
        for chunk in chunks
    ]


def _beside_datasets(case: Case, model: Path, folder: Path) -> list[Figure]:
    """Measure whole files on two cores: Ray and its workers are up before the clock runs."""
    with OnCores():
        ways = [
            lambda _: _ours_on_ray(case, model, folder),
            lambda _: _datasets_map(case, model, folder),
        ]
        for way in ways:
            way(0)
        ours, theirs = alternate(ways, ROUNDS_BESIDE_DATASETS)
    named = f"{case.name}, {CORES} cores: "
    return [
        Figure(name=named + "ours on Ray", value=statistics.median(ours), unit="tokens/s"),
        Figure(name=named + "datasets.map", value=statistics.median(theirs), unit="tokens/s"),
        at_least(named + "ours / datasets.map", ratio(ours, theirs), "times", 1.5),
    ]


def _ours_on_ray(case: Case, model: Path, folder: Path) -> float:
    from launcher.data.store import read_meta
    from launcher.stores import OnRay

    store = folder / "store"

    def work() -> int:
        jobs = _described(case, model, store).jobs
        make_all(jobs, OnRay())
        meta = read_meta(Path(jobs[0].directory)) or {}
        return int(meta["counts"]["num_tokens"])

    taken, num_tokens = timed(work)
    storage.delete(store)
    return num_tokens / taken.wall_s


def _datasets_map(case: Case, model: Path, folder: Path) -> float:
    import datasets

    datasets.disable_progress_bars()
    tokenizer = _tokenizer(model)
    cache = folder / "cache"

    def work() -> Any:
        kind = "json" if case.file.suffix == ".jsonl" else "parquet"
        loaded = datasets.load_dataset(
            kind, data_files=str(case.file), cache_dir=str(cache), split="train", num_proc=1
        )
        return loaded.map(
            lambda batch: tokenizer(batch["text"]),
            batched=True,
            num_proc=CORES,
            remove_columns=loaded.column_names,
        )

    taken, mapped = timed(work)
    lengths = mapped.with_format("arrow")["input_ids"]
    num_tokens = sum(len(chunk.values) for chunk in getattr(lengths, "chunks", [lengths]))
    storage.delete(cache)
    return num_tokens / taken.wall_s


def _until_first_window(case: Case, model: Path, folder: Path) -> float:
    from launcher.stores import OnRay

    store = folder / "store"
    held: list[Preparation] = []

    def work() -> None:
        jobs = _described(case, model, store, steps=100).jobs
        held.append(Preparation(jobs, OnRay()))
        held[0].start()
        held[0].wait_for([], first=jobs)

    taken, _ = timed(work)
    held[0].close()
    storage.delete(store)
    return taken.wall_s


def _good(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def one_core() -> None:
    """Keep the tokenizers of this process, and of those it begins, to one core each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
