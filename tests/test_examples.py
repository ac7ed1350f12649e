"""What a stage shows of its answers: all tasks by real engines on one rank and on two, and what is chosen."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import examples, storage
from launcher.examples import Row, chosen_of
from launcher.report.record import Recorder
from launcher.tasks.shown import Shown
from tests.conftest import chat_rows, join_ranks, write_jsonl
from tests.train import test_same_on_any_ranks as same
from tests.train import transfer_ranks as ranks

# Ranks in a world, and the ZeRO stage there.
STAGES = {1: 0, 2: 3}
NUM_ROWS = {"labels": 23, "tags": 23, "answers": 11, "translation": 11, "chat": 11}
NUM_TIMES = 20
MORE: dict[str, dict[str, Any]] = {
    "many": {"task": "text-classification", "data": {"label_type": "multiple"}},
    "numbers": {"task": "text-classification", "data": {"label_type": "number"}},
    "talk": {"task": "causal-lm"},
    "text": {"task": "causal-lm", "data": {"format": "text"}},
    "broken": {"task": "text-classification"},
}


def _more(folder: Path, of_labels: ranks.Case, of_chat: ranks.Case) -> dict[str, ranks.Case]:
    """Cases that evaluate in other ways, on the models of two others."""
    draw, words = random.Random(5), same.WORDS
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(30)]
    rows: dict[str, list[dict[str, Any]]] = {
        "many": [{"text": t, "label": draw.sample(["a", "b", "c"], draw.randint(0, 2))} for t in texts],
        "numbers": [{"text": t, "label": draw.gauss(0, 1)} for t in texts],
        "talk": chat_rows(20, 3),
        "text": [{"text": f"{t} . {t}"} for t in texts],
        "broken": [{"text": t, "label": draw.choice(["a", "b"])} for t in texts],
    }
    made = {}
    for name, keys in MORE.items():
        path = str(write_jsonl(folder / f"{name}.jsonl", rows[name]))
        data = {"train": path, "eval": path} | keys.get("data", {})
        stage = {"max_length": 64, "micro_batch": 2} | keys | {"name": name, "data": data}
        model = (of_chat if keys["task"] == "causal-lm" else of_labels).tree["model"]
        made[name] = ranks.case(name, "", 0, {"model": model, "stages": [stage]}, folder)
    return made


def _rank(rank: int, num_ranks: int, port: int, asked_for: list[ranks.Case], out: str) -> None:
    join_ranks(rank, num_ranks, port)
    told = {each.name: _told(each, rank, num_ranks) for each in asked_for}
    if rank == 0:
        Path(out).write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def _told(case: ranks.Case, rank: int, num_ranks: int) -> dict[str, Any]:
    """End a stage as a run does; return the metrics and the record, and what a second try leaves."""
    from launcher.assembly import assemble, write_export

    events: list[dict[str, Any]] = []
    context = replace(ranks.context_of(case, rank, num_ranks), recorder=Recorder(None, events.append))
    built = assemble(context, context.plan.stages[0])
    part = built.parts[0]
    sums = built.engine.sums(0, part.eval_batches())
    if case.name == "broken" and rank == num_ranks - 1:
        part.task.tokenizer = None  # No text can be made of ids.
    file = context.stage_dir(case.name) / examples.FILE
    examples.write(context, built.engine, 0, part, part.task.tables(sums))
    before = file.read_bytes() if rank == 0 else b""
    # Who comes after one that failed here finds the file.
    examples.write(context, built.engine, 0, part, {"matrix": "of another try"})
    write_export(context, part, 0, built)
    built.engine.close()
    is_left_alone = rank > 0 or file.read_bytes() == before
    return {"metrics": part.task.metrics(sums), "events": events, "is_left_alone": is_left_alone}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By the number of ranks and the case: the file, the metrics, the record."""
    folder = tmp_path_factory.mktemp("examples")
    few = same.cases(folder, NUM_ROWS)
    cases = few | same.cases(folder / "often", {"labels": NUM_ROWS["labels"]}, NUM_TIMES)
    cases |= _more(folder, few["labels"], few["chat"])
    worlds = {}
    for num_ranks, stage in STAGES.items():
        here = folder / str(num_ranks)
        mine = [replace(each, stage=stage, run_dir=here / name) for name, each in cases.items()]
        out = folder / f"{num_ranks}.json"
        same.start(_rank, num_ranks, mine, str(out))
        worlds[num_ranks] = {
            name: told | {"file": storage.read_json(here / name / "stages" / name / examples.FILE)}
            for name, told in json.loads(out.read_text()).items()
        }
    return worlds


NAMES = [name for name in (*NUM_ROWS, *MORE) if name != "broken"]
pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_on_any_ranks_and_made_once(worlds: dict, name: str) -> None:
    for told in (found[name] for found in worlds.values()):
        (event,) = [event for event in told["events"] if event["kind"] == "examples"]
        assert "fault" not in event
        assert event["num"] == told["file"]["num"] and event["seconds"] < 20
        assert told["is_left_alone"]
    alone, shared = (found[name]["file"] for found in worlds.values())
    assert alone == shared
    assert alone["samples"] and "NaN" not in json.dumps(alone)
    for each in alone["samples"]:
        assert set(each) == {"input", "expected", "answer", "is_right", "score"}
        assert each["input"] and each["answer"] is not None and len(each["input"]) < 500


@pytest.mark.slow
def test_what_fails_on_one_rank_is_told_and_ends_nothing(worlds: dict) -> None:
    for told, has_others in ((worlds[1]["broken"], False), (worlds[2]["broken"], True)):
        shown, exported = told["events"]
        assert "NoneType" in shown["fault"] and exported["kind"] == "export"
        assert (Path(exported["path"]) / "config.json").exists()
        file = told["file"]
        assert sum(map(sum, file["matrix"]["counts"])) == file["of"] == 30
        assert bool(file["samples"]) == has_others and file["num"] == shown["num"] < 30


@pytest.mark.slow
def test_labels(worlds: dict) -> None:
    file, metrics = (worlds[2]["labels"][key] for key in ("file", "metrics"))
    assert (file["num"], file["of"]) == (examples.MOST_ROWS, NUM_ROWS["labels"] * NUM_TIMES)
    labels, counts = file["matrix"]["labels"], torch.tensor(file["matrix"]["counts"])
    assert labels == ["no", "perhaps", "yes"] and counts.sum() == file["of"]
    assert counts.diagonal().sum() / counts.sum() == pytest.approx(metrics["accuracy"])
    samples = file["samples"]
    assert len(samples) == examples.MOST_SHOWN
    assert all(each["is_right"] == (each["expected"] == each["answer"]) for each in samples)
    assert all(counts[labels.index(s["expected"]), labels.index(s["answer"])] for s in samples)
    assert all(1 / 3 <= each["score"] <= 1 for each in samples)
    wrong = [each["score"] for each in samples[: examples.MOST_SHOWN // 2] if not each["is_right"]]
    assert len(wrong) == examples.MOST_SHOWN // 2 and wrong == sorted(wrong, reverse=True)
    assert any(each["is_right"] for each in samples)
    assert set(" ".join(each["input"] for each in samples).split()) <= set(same.WORDS)


@pytest.mark.slow
def test_entities(worlds: dict) -> None:
    file, metrics = (worlds[2]["tags"][key] for key in ("file", "metrics"))
    assert [each["type"] for each in file["entities"]] == ["LOC", "PER"]
    sums = Counter[str]()
    for each in file["entities"]:
        sums.update({key: each[key] for key in ("expected", "found", "right")})
        assert each["recall"] == each["right"] / each["expected"]
    assert sums["right"] / sums["expected"] == metrics["recall"] and sums["right"]
    assert sums["right"] / sums["found"] == metrics["precision"]
    # All rows were looked at, and few enough to be shown.
    assert file["num"] == file["of"] == len(file["samples"]) == NUM_ROWS["tags"]
    said = [(kind, len(s["expected"]), len(s["answer"])) for s in file["samples"] for kind in [s["is_right"]]]
    assert sum(n for _, n, _ in said) == sums["expected"] and sum(n for *_, n in said) == sums["found"]
    for each in file["samples"]:
        assert each["is_right"] == (each["expected"] == each["answer"])
        for entity in each["expected"] + each["answer"]:
            kind, words = entity.split(": ")
            assert kind in ("LOC", "PER") and words in each["input"]


@pytest.mark.slow
def test_questions(worlds: dict) -> None:
    file, metrics = (worlds[2]["answers"][key] for key in ("file", "metrics"))
    samples = file["samples"]
    assert file["num"] == file["of"] == len(samples) == NUM_ROWS["answers"], "questions, not windows"
    assert 100 * sum(each["score"] for each in samples) / len(samples) == pytest.approx(metrics["f1"])
    exact = 100 * sum(each["is_right"] for each in samples) / len(samples)
    assert exact == pytest.approx(metrics["exact_match"])
    for each in samples:
        question, piece = each["input"].split("\n")
        assert len(question.split()) == 4 and each["expected"] in piece and len(piece) < 250


@pytest.mark.slow
def test_texts(worlds: dict) -> None:
    translated = worlds[2]["translation"]["file"]["samples"]
    assert len(translated) == NUM_ROWS["translation"]
    scores = [each["score"] for each in translated]
    assert scores[:5] == sorted(scores)[:5] and 0 < max(scores) < 100
    chat, metrics = (worlds[2]["chat"][key] for key in ("file", "metrics"))
    right = [each["is_right"] for each in chat["samples"]]
    assert sum(right) / len(right) == metrics["exact_match"]
    for name in ("talk", "text"):
        told = worlds[2][name]["file"]
        samples = told["samples"]
        assert told["num"] == told["of"] > len(samples) == examples.SHORT_ROWS
        assert all(each["is_right"] is None and each["score"] > 0 for each in samples)
        assert len({each["answer"] for each in samples}) > 1
        worst = [each["score"] for each in samples[: examples.SHORT_ROWS // 2]]
        assert worst == sorted(worst) and worst[0] < samples[-1]["score"] < 1
    # Some of the talks are cut to the length of the stage.
    talks = worlds[2]["talk"]["file"]["samples"]
    assert all("assistant" in each["input"] for each in talks)
    assert any(each["expected"].endswith(" .") for each in talks)
    for each in worlds[2]["text"]["file"]["samples"]:
        assert " . " in f"{each['input']} {each['expected']}"


@pytest.mark.slow
def test_numbers_and_many_labels(worlds: dict) -> None:
    file, metrics = (worlds[2]["numbers"][key] for key in ("file", "metrics"))
    off = [abs(each["expected"] - each["answer"]) for each in file["samples"]]
    assert len(off) == file["of"] and sum(off) / len(off) == pytest.approx(metrics["mae"], rel=1e-4)
    assert off[0] == max(off)
    file, metrics = (worlds[2]["many"][key] for key in ("file", "metrics"))
    right = [each["is_right"] for each in file["samples"]]
    assert sum(right) / len(right) == metrics["exact_match"]
    assert all(each["is_right"] == (each["expected"] == each["answer"]) for each in file["samples"])


def _rows(num_wrong: int, num_right: int, num_open: int = 0) -> list[Row]:
    marks = [False] * num_wrong + [True] * num_right + [None] * num_open
    rows = [Row(i, Shown("", "", "", mark, None, badness=float(i % 7))) for i, mark in enumerate(marks)]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize(
    ("counts", "wrong", "right", "undecided"),
    [
        ((100, 100, 0), 20, 20, 0),
        ((100, 5, 0), 35, 5, 0),
        ((3, 100, 0), 3, 37, 0),
        ((0, 100, 0), 0, 40, 0),
        ((100, 0, 0), 40, 0, 0),
        ((0, 0, 100), 0, 0, 40),
        ((2, 3, 0), 2, 3, 0),
        ((0, 0, 0), 0, 0, 0),
    ],
)
def test_half_are_wrong_where_there_are_so_many(counts, wrong: int, right: int, undecided: int) -> None:
    rows = _rows(*counts)
    chosen = chosen_of(rows, 40)
    marks = Counter(row.shown.is_right for row in chosen)
    assert (marks[False], marks[True], marks[None]) == (wrong, right, undecided)
    assert len({row.sample for row in chosen}) == len(chosen)
    assert chosen == chosen_of(sorted(rows, key=lambda row: row.sample), 40)
    bad, all_bad = (
        [row.shown.badness for row in each if row.shown.is_right is not True] for each in (chosen, rows)
    )
    assert bad[:20] == sorted(all_bad, reverse=True)[: len(bad[:20])]
