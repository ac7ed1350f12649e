"""Making token stores: interrupted, beside another run, on a full disk, from bad rows and changed files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher import recipe as recipes
from launcher import stores
from launcher.data import store
from launcher.data.order import BLOCKS_PER_WINDOW
from launcher.data.split import Split
from launcher.data.store import Store
from launcher.describe import Described, describe
from launcher.errors import DataError, RunExists, StorageError
from launcher.facts import Prepared, facts, needed_first, prepare_all
from launcher.plan.plan import ModelFacts
from launcher.preparation import Inline, Preparation
from tests.conftest import ROOT, make_tokenizer, sentence, write_jsonl

FACTS = ModelFacts(max_positions=64)
CHUNK = 4096


class Case:
    """A recipe with one stage of plain text or labelled rows, in many chunks."""

    def __init__(self, folder: Path, num_rows: int = 1200) -> None:
        draw = random.Random(0)
        self.folder = folder
        self.rows = [{"text": sentence(draw, 8), "label": ("good", "bad")[i % 2]} for i in range(num_rows)]
        self.train = write_jsonl(folder / "train.jsonl", self.rows)
        make_tokenizer(folder / "tokenizer", [row["text"] for row in self.rows[:200]])
        self.data: dict[str, Any] = {"train": str(self.train)}
        self.stage: dict[str, Any] = {"name": "a", "task": "causal-lm", "max_length": 32, "data": self.data}

    def recipe(self) -> dict[str, Any]:
        config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config |= {"intermediate_size": 16, "max_position_embeddings": 64}
        model = {"config": config, "tokenizer": str(self.folder / "tokenizer")}
        return recipes.dump(recipes.parse({"model": model, "stages": [self.stage]}))

    def prepare(self, where: str = "store") -> Prepared:
        return prepare_all(self.recipe(), FACTS, str(self.folder / where), CHUNK)

    def describe(self, where: str = "store", chunk_bytes: int = CHUNK) -> Described:
        described = describe(self.recipe(), FACTS, str(self.folder / where), chunk_bytes)
        assert isinstance(described, Described), described
        return described


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def content(prepared: Prepared) -> str:
    return str((store.read_meta(Path(prepared.facts[0].train.stores[0])) or {})["content"])


def texts(case: Case, prepared: Prepared, split: str = "train") -> list[str]:
    """What a prepared split's samples say."""
    from transformers import AutoTokenizer

    known = getattr(prepared.facts[0], split)
    whole = Split([Store(Path(path)) for path in known.stores])
    tokenizer = AutoTokenizer.from_pretrained(case.folder / "tokenizer")
    return [
        tokenizer.decode(x, skip_special_tokens=True) for x in whole.ragged(whole.all_samples())["input_ids"]
    ]


def test_every_row_becomes_a_sample_and_the_next_run_finds_the_store(case: Case) -> None:
    prepared = case.prepare()
    train = prepared.facts[0].train
    assert texts(case, prepared) == [row["text"] for row in case.rows]
    assert train.is_whole and train.num_samples == 1200 and train.num_packs > 0
    blocks = sorted(Path(train.stores[0]).glob("block-*"))
    assert len(blocks) > BLOCKS_PER_WINDOW
    times = [block.stat().st_mtime_ns for block in blocks]
    assert case.prepare().facts == prepared.facts
    assert [block.stat().st_mtime_ns for block in blocks] == times


# A driver that prepares; each chunk it makes is a line in a log. Slow on purpose, so that it can be met midway.
DRIVER = """
import json, sys, time
from launcher import facts, preparation
from launcher.plan.plan import ModelFacts

class Slow(preparation.Inline):
    def submit(self, function, *args):
        time.sleep(0.03)
        handle = super().submit(function, *args)
        with open(sys.argv[3], "a") as log:
            log.write(f"{args[1]}\\n")
        return handle

preparation.Inline = Slow
prepared = facts.prepare_all(json.loads(sys.argv[1]), ModelFacts(max_positions=64), sys.argv[2], 4096)
print(prepared.facts[0].train.num_samples)
"""


def driver(case: Case, log: str) -> subprocess.Popen[str]:
    arguments = [json.dumps(case.recipe()), str(case.folder / "store"), str(case.folder / log)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str], timeout_s: float = 90) -> str:
    """Wait for a driver; return what it printed, its last error if it failed."""
    out, err = process.communicate(timeout=timeout_s)
    return out.strip() if process.returncode == 0 else f"exit {process.returncode}: {err[-2000:]}"


def made(case: Case, log: str) -> list[int]:
    file = case.folder / log
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_killed_preparation_goes_on_where_it_was(case: Case) -> None:
    expected = content(case.prepare("elsewhere"))
    first = driver(case, "first")
    deadline = time.monotonic() + 60
    while len(made(case, "first")) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = made(case, "first")
    second = driver(case, "second")
    assert outcome(second, 60) == "1200"
    after = made(case, "second")
    num_chunks = case.describe().jobs[0].num_chunks
    assert not set(before) & set(after)
    # The one in progress may have been written just before its line.
    assert num_chunks - 1 <= len(before) + len(after) <= num_chunks
    assert content(case.prepare()) == expected


def test_two_runs_at_once_do_the_work_once(case: Case) -> None:
    pair = [driver(case, "one"), driver(case, "two")]
    for each in pair:
        assert outcome(each) == "1200"
    times = Counter(made(case, "one") + made(case, "two"))
    assert set(times.values()) == {1} and len(times) == case.describe().jobs[0].num_chunks


def test_a_run_goes_on_with_what_a_killed_one_was_making(case: Case) -> None:
    first, second = driver(case, "one"), driver(case, "two")
    deadline = time.monotonic() + 60
    while max(len(made(case, "one")), len(made(case, "two"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    maker, other = (first, second) if made(case, "one") else (second, first)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert outcome(other, 60) == "1200"


def test_a_full_disk_keeps_what_was_made(case: Case) -> None:
    disk = case.folder / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=192k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with pytest.raises(StorageError) as told:
            case.prepare("disk")
        assert "No space left on device" in str(told.value) and "\n" not in str(told.value)
        (directory,) = disk.glob("tokens-*")
        blocks = [file for file in directory.iterdir() if file.name.startswith("block-")]
        assert blocks and all(store.block_counts(block) for block in blocks)
        assert store.read_meta(directory) is None
        times = {block: block.stat().st_mtime_ns for block in blocks}
        os.system(f"mount -o remount,size=8m {disk}")
        assert case.prepare("disk").facts[0].train.num_samples == 1200
        assert {block: block.stat().st_mtime_ns for block in blocks} == times
    finally:
        os.system(f"umount -l {disk}")


def test_a_damaged_block_is_made_again(case: Case) -> None:
    prepared = case.prepare()
    block = sorted(Path(prepared.facts[0].train.stores[0]).glob("block-*"))[3]
    block.write_bytes(block.read_bytes()[:100])
    assert content(case.prepare()) == content(prepared)
    assert len(texts(case, prepared)) == 1200


def test_a_changed_file_is_noticed(case: Case) -> None:
    first = case.prepare()
    at = case.train.stat()
    # Copied or touched: the order stays; looked at again all the same.
    os.utime(case.train, ns=(at.st_atime_ns, at.st_mtime_ns + 10**9))
    touched = case.prepare()
    assert touched.facts[0].train.stores != first.facts[0].train.stores
    assert touched.facts[0].train.fingerprint == first.facts[0].train.fingerprint
    assert content(touched) == content(first)
    # Of the same size, with other words.
    changed = case.train.read_text().replace("river", "RIVER")
    case.train.write_text(changed)
    os.utime(case.train, ns=(at.st_atime_ns, at.st_mtime_ns + 2 * 10**9))
    assert content(case.prepare()) != content(first)
    # Longer by a row.
    case.train.write_text(changed + json.dumps({"text": "one more"}) + "\n")
    longer = case.prepare()
    assert longer.facts[0].train.fingerprint != first.facts[0].train.fingerprint
    assert longer.facts[0].train.num_samples == 1201


def test_a_run_does_not_go_on_with_other_files(tmp_path: Path) -> None:
    began = {"a [0]": [("/d/x.jsonl", 100), ("/d/y.jsonl", 50)]}
    (tmp_path / stores.DATA).write_text(json.dumps(began))
    stores.check_data(tmp_path, began)
    with pytest.raises(RunExists, match=r"/d/y.jsonl with 50 bytes then, /d/y.jsonl with 51 bytes now"):
        stores.check_data(tmp_path, {"a [0]": [("/d/x.jsonl", 100), ("/d/y.jsonl", 51)]})
    with pytest.raises(RunExists, match="/d/y.jsonl with 50 bytes then, no such file now"):
        stores.check_data(tmp_path, {"a [0]": [("/d/x.jsonl", 100)]})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """100,000 rows, one of which has no text."""
    case = Case(tmp_path_factory.mktemp("large"), 100)
    lines = [json.dumps({"text": f"row {i}"}) for i in range(100_000)]
    lines[77_776] = json.dumps({"text": None})
    case.train.write_text("\n".join(lines) + "\n")
    case.stage |= {"max_length": 16}
    return case


def test_one_bad_row_in_100000_stops_the_run_and_is_named(large: Case) -> None:
    large.data.pop("on_bad_row", None)
    with pytest.raises(DataError, match=r'train.jsonl, line 77777: column "text" is empty \(null\)'):
        prepare_all(large.recipe(), FACTS, str(large.folder / "error"))


def test_one_bad_row_in_100000_is_skipped_and_listed(large: Case) -> None:
    large.data["on_bad_row"] = "skip"
    train = prepare_all(large.recipe(), FACTS, str(large.folder / "skip")).facts[0].train
    assert (train.num_bad, train.num_samples) == (1, 99_999)
    (listed,) = (Path(train.stores[0]) / "bad_rows.jsonl").read_text().splitlines()
    told = json.loads(listed)
    assert told["where"].endswith("train.jsonl, line 77777") and "null" in told["reason"]


def test_too_many_bad_rows_stop_the_run_all_the_same(case: Case) -> None:
    rows: list[dict[str, Any]] = [*case.rows]
    for i in range(0, 1200, 100):
        rows[i] = {"text": 7}
    write_jsonl(case.train, rows)
    case.data |= {"on_bad_row": "skip", "bad_row_limit": 5}
    with pytest.raises(DataError, match=r"bad_row_limit"):
        case.prepare()
    case.data["bad_row_limit"] = 12
    assert case.prepare().facts[0].train.num_bad == 12


def test_labels_are_gathered_from_all_data_sets(case: Case) -> None:
    other = write_jsonl(case.folder / "other.jsonl", [{"text": "so so", "label": "fair"}] * 5)
    case.stage |= {"task": "text-classification"}
    case.data["train"] = [{"path": str(case.train), "weight": 3}, {"path": str(other)}]
    case.data["eval"] = str(other)
    known = case.prepare().facts[0]
    assert known.train.labels == ("bad", "fair", "good")
    assert known.train.weights == (3.0, 1.0) and known.train.num_samples == 1205
    labels = Split([Store(Path(path)) for path in known.eval.stores])
    assert set(labels.scalars(labels.all_samples())["labels"].tolist()) == {1}


def test_a_label_keeps_its_number_only_among_the_same_labels(case: Case) -> None:
    other = write_jsonl(case.folder / "other.jsonl", [{"text": "so so", "label": "fair"}] * 5)
    case.stage |= {"task": "text-classification"}
    case.data["train"] = [str(case.train), {"path": str(other)}]
    three = case.prepare().facts[0].train
    case.data["train"] = str(case.train)
    two = case.prepare().facts[0].train
    assert three.labels == ("bad", "fair", "good") and two.labels == ("bad", "good")
    assert three.stores[0] != two.stores[0]


def test_lost_labels_are_gathered_again(case: Case) -> None:
    case.stage |= {"task": "text-classification"}
    first = case.prepare().facts[0].train
    (Path(first.stores[0]) / "labels.json").unlink()
    assert case.prepare().facts[0].train == first


def test_every_stage_has_its_labels_when_training_begins(case: Case) -> None:
    parquet = case.folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(case.rows), parquet, row_group_size=20)
    case.stage |= {"task": "text-classification"}
    case.data["train"] = str(parquet)
    described = case.describe(chunk_bytes=1024)
    preparation = Preparation(described.jobs, Inline())
    preparation.start()
    preparation.wait_for([])
    assert facts(recipes.parse(case.recipe()), described)[0].train.labels == ("bad", "good")
    preparation.close()


def test_a_label_that_changes_in_train_changes_its_number_in_eval(case: Case) -> None:
    case.stage |= {"task": "text-classification"}
    held_out = write_jsonl(case.folder / "eval.jsonl", [{"text": "x y z", "label": "bad"}])
    case.data["eval"] = str(held_out)
    first = case.prepare().facts[0]
    # As long as before: only the time of change tells.
    case.train.write_text(case.train.read_text().replace('"good"', '"able"'))
    second = case.prepare().facts[0]
    assert first.train.labels == ("bad", "good") and second.train.labels == ("able", "bad")
    for known, number in ((first, 0), (second, 1)):
        whole = Split([Store(Path(path)) for path in known.eval.stores])
        assert whole.scalars(whole.all_samples())["labels"].tolist() == [number]


def test_another_end_token_is_another_store(case: Case) -> None:
    first = case.prepare().facts[0].train
    file = case.folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert case.prepare().facts[0].train.stores != first.stores


def test_what_leaves_no_row_is_named(case: Case) -> None:
    case.data["train"] = {"path": str(case.train), "filters": [["label", "==", "ugly"]]}
    with pytest.raises(DataError, match=r"none of its rows pass the filters \[\['label', '==', 'ugly'\]\]"):
        case.prepare()
    write_jsonl(case.train, case.rows[:3])
    case.data |= {"train": str(case.train), "eval_fraction": 0.001}
    with pytest.raises(DataError, match=r"none of its rows fall into the part 0 to 0.001: take a larger"):
        case.prepare()


def test_a_data_set_of_its_own_columns_filters_and_part(case: Case) -> None:
    other = case.folder / "other.parquet"
    rows = {"body": [f"text {i}" for i in range(500)], "stars": list(np.arange(500) % 5)}
    pq.write_table(pa.table(rows), other)
    case.data["train"] = [
        str(case.train),
        {"path": str(other), "columns": {"text": "body"}, "filters": [["stars", ">", 3]]},
    ]
    said = texts(case, case.prepare())
    assert len(said) == 1200 + 100 and said[-1] == "text 499"
    case.data.clear()
    case.data |= {"train": str(other), "columns": {"text": "body"}, "eval_fraction": 0.2}
    prepared = case.prepare()
    train, evaluated = texts(case, prepared), texts(case, prepared, "eval")
    assert len(train) + len(evaluated) == 500 and not set(train) & set(evaluated)
    assert 60 < len(evaluated) < 140


def test_training_can_begin_with_the_first_window(case: Case) -> None:
    case.stage["steps"] = 5
    described = case.describe()
    (job,) = described.jobs
    recipe = recipes.parse(case.recipe())
    assert needed_first(recipe, described, [False]) == ([], [job])

    class Counting(Inline):
        num_tasks = 0

        def submit(self, function: Any, *args: Any) -> Any:
            if self.num_tasks == BLOCKS_PER_WINDOW:
                time.sleep(3600)  # A thread that dies with the process.
            self.num_tasks += 1
            return super().submit(function, *args)

    executor = Counting()
    preparation = Preparation(described.jobs, executor)
    preparation.start()
    preparation.wait_for([], [job])
    assert executor.num_tasks == BLOCKS_PER_WINDOW < job.num_chunks
    known = facts(recipe, described)[0].train
    assert not known.is_whole and not known.is_settled
    opened = Store(Path(job.directory))
    for block in job.order[:BLOCKS_PER_WINDOW]:
        assert len(opened.block(block).lengths)


def test_what_training_has_to_wait_for(case: Case) -> None:
    parquet = case.folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(case.rows), parquet, row_group_size=20)
    case.stage |= {"task": "text-classification", "global_batch": 8}
    case.data |= {"train": str(parquet), "labels": ["bad", "good"]}

    chunk_bytes = 1024

    def first(**stage: Any) -> list[str]:
        case.stage = {**case.stage, **stage}
        described = case.describe(chunk_bytes=chunk_bytes)
        whole, begun = needed_first(recipes.parse(case.recipe()), described, [False])
        assert len(whole) + len(begun) == 1
        return ["whole"] if whole else ["window"]

    # Headers tell the rows, and each is a sample: the steps of an epoch are known.
    assert first() == ["window"]
    assert first(global_batch="640 tokens") == ["whole"]
    assert first(global_batch=8) == ["window"]
    case.data["train"] = {"path": str(parquet), "filters": [["label", "==", "bad"]]}
    assert first() == ["whole"]
    assert first(steps=10) == ["window"]
    # No more than a window: all of it, so that its mistakes are told before training.
    chunk_bytes = 1 << 20
    assert first() == ["whole"]
