"""All tasks through whole runs on real Ray and ZeRO-3: stages in sequence and joint, judged again from the export."""

import json
import random
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_tokenizer, write_jsonl
from tests.tasks.words import word_piece
from tests.test_end_to_end import PYTHON, _command, _run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PEOPLE, PLACES, OTHERS = (
    ["ada", "karl", "mary"],
    ["rome", "oslo", "bonn"],
    "sees likes the old road to from".split(),
)


def _tagged(draw: random.Random) -> dict:
    words, tags = [], []
    for _ in range(draw.randint(3, 7)):
        kind = draw.choice(["O", "O", "PER", "LOC"])
        words.append(draw.choice({"O": OTHERS, "PER": PEOPLE, "LOC": PLACES}[kind]))
        tags.append("O" if kind == "O" else f"B-{kind}")
    return {"tokens": words, "tags": tags}


def _asked(draw: random.Random, number: int) -> dict:
    who, where = draw.choice(PEOPLE), draw.choice(PLACES)
    context = f"{draw.choice(OTHERS)} {who} likes the road to {where} {draw.choice(OTHERS)}"
    answers = {"text": [where], "answer_start": [context.index(where)]}
    return {"id": f"q{number}", "question": "likes the road to", "context": context, "answers": answers}


def _labelled(draw: random.Random) -> dict:
    row = _tagged(draw)
    return {"text": " ".join(row["tokens"]), "label": "yes" if "B-LOC" in row["tags"] else "no"}


def _files(folder: Path, name: str, rows: list[dict]) -> dict[str, str]:
    cut = len(rows) * 3 // 4
    train, held = rows[:cut], rows[cut:]
    return {
        "train": str(write_jsonl(folder / f"{name}.train.jsonl", train)),
        "eval": str(write_jsonl(folder / f"{name}.eval.jsonl", held)),
    }


def _summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def _evaluated(run_dir: Path, stage: str, *more: str) -> dict[str, float]:
    result = _run([PYTHON, "-m", "launcher.evaluate", str(run_dir), "--stage", stage, *more])
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines() if len(line.split()) >= 2]
    return {
        parts[0]: float(parts[1]) for parts in lines if parts[1].replace(".", "").lstrip("-")[:1].isdigit()
    }


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    folder, draw = tmp_path_factory.mktemp("sequence"), random.Random(0)
    word_piece(folder, [" ".join(PEOPLE + PLACES + OTHERS)], 200).save_pretrained(folder / "tokenizer")
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 64}
    common = {"global_batch": 16, "learning_rate": 5.0e-3, "max_length": 32}
    stages = [
        {
            "name": "tags",
            "task": "token-classification",
            "head": {"kind": "crf", "constrained": True, "learning_rate": 1.0e-2},
            "data": _files(folder, "tags", [_tagged(draw) for _ in range(160)]),
            "steps": 30,
            **common,
        },
        {
            "name": "answers",
            "task": "question-answering",
            "answers": {"stride": 4},
            "data": _files(folder, "answers", [_asked(draw, i) for i in range(120)]),
            "trainable": {"freeze": ["word_embeddings"], "layer_decay": 0.9},
            "steps": 25,
            **common,
        },
        {
            "name": "labels",
            "task": "text-classification",
            "data": _files(folder, "labels", [_labelled(draw) for _ in range(160)]),
            "trainable": {"lora": {"rank": 4, "modules": ["query", "value"], "export": "adapter"}},
            "select": {"patience": 2},
            "eval_every": 4,
            "steps": 40,
            **common,
        },
    ]
    model = {"config": config, "tokenizer": str(folder / "tokenizer"), "add_tokens": ["<name>"]}
    recipe = {"model": model, "stages": stages, "baseline": True}
    (folder / "all.yaml").write_text(yaml.safe_dump(recipe))
    result = _run(_command(folder, str(folder / "all.yaml"), "--workers", "2", "--name", "all"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result, folder / "all"


def test_each_task_learns_and_the_transfer_is_told(sequence: tuple) -> None:
    result, run_dir = sequence
    summary = _summary(run_dir)
    stages = summary["stages"]
    assert stages["tags"]["metrics"]["f1"] > 0.8
    assert stages["answers"]["metrics"]["exact_match"] > 30
    assert stages["labels"]["num_trainable"] < stages["labels"]["num_parameters"] / 4
    assert stages["answers"]["num_trainable"] < stages["tags"]["num_trainable"]
    assert set(summary["transfer"]["forgetting"]) == {"tags", "answers"}
    assert summary["transfer"]["gain"] == pytest.approx(
        stages["labels"]["metrics"]["accuracy"] - stages["baseline"]["metrics"]["accuracy"]
    )
    assert "on the trunk that labels left" in result.stdout
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    judged = [e for e in events if e["kind"] == "eval" and e["stage"] == "labels"]
    assert stages["labels"]["metrics"]["accuracy"] == max(e["metrics"]["accuracy"] for e in judged)


@pytest.mark.parametrize("stage", ["tags", "answers", "labels"])
def test_the_export_alone_gives_the_same_metrics(sequence: tuple, stage: str) -> None:
    _, run_dir = sequence
    told = _summary(run_dir)["stages"][stage]["metrics"]
    again = _evaluated(run_dir, stage)
    for name, value in told.items():
        assert again[name] == pytest.approx(value, rel=1e-4 if name == "loss" else 1e-12), name


def test_the_answers_shown_are_those_of_the_export(sequence: tuple, tmp_path: Path) -> None:
    """Of the best step, not of the last: what is exported."""
    _, run_dir = sequence
    stages = _summary(run_dir)["stages"]
    shown = {name: _shown(run_dir, name) for name in ("tags", "answers", "labels")}
    counts = shown["labels"]["matrix"]["counts"]
    right, total = sum(counts[i][i] for i in range(2)), sum(map(sum, counts))
    assert total == shown["labels"]["of"] and right / total == stages["labels"]["metrics"]["accuracy"]
    _evaluated(run_dir, "labels", "--predictions", str(tmp_path / "said.jsonl"))
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    path = Path(recipe["stages"][2]["data"]["eval"][0]["path"])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    expected = {text: (each["reference"], each["prediction"]) for text, each in zip(texts, said, strict=True)}
    assert {each["input"] for each in shown["labels"]["samples"]} <= set(expected)
    for each in shown["labels"]["samples"]:
        assert (each["expected"], each["answer"]) == expected[each["input"]]
    entities = shown["tags"]["entities"]
    right, there = (sum(each[key] for each in entities) for key in ("right", "expected"))
    assert right / there == stages["tags"]["metrics"]["recall"]
    of_answers = shown["answers"]
    f1 = 100 * sum(each["score"] for each in of_answers["samples"]) / len(of_answers["samples"])
    assert len(of_answers["samples"]) == of_answers["of"]
    assert f1 == pytest.approx(stages["answers"]["metrics"]["f1"], rel=1e-4)
    assert not (run_dir / "stages" / "baseline" / "examples.json").exists()


def _shown(run_dir: Path, stage: str) -> dict:
    """Return a stage's examples, of which the record must not say that anything went wrong."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (event,) = [each for each in events if each["kind"] == "examples" and each["stage"] == stage]
    print(stage, event)
    assert "fault" not in event
    return json.loads((run_dir / "stages" / stage / "examples.json").read_text())


def test_exports_load_plainly_and_hold_what_was_asked(sequence: tuple) -> None:
    import transformers
    from peft import PeftModel

    _, run_dir = sequence
    export = run_dir / "stages" / "tags" / "export"
    assert (export / "crf.safetensors").exists() and "crf" in (export / "README.md").read_text()
    model, info = transformers.AutoModelForTokenClassification.from_pretrained(
        export, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.tokenize("ada <name>")[-1] == "<name>"
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    labels = run_dir / "stages" / "labels"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        run_dir / "stages" / "answers" / "export", num_labels=2
    )
    adapted = PeftModel.from_pretrained(base, labels / "adapter").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(labels / "export").eval()
    inputs = tokenizer(["ada sees oslo", "the old road"], return_tensors="pt", padding=True)
    # The trunk of a question-answering model has no pooler: it is the adapter's with the head, or drawn anew.
    trunk = [m.bert(**inputs).last_hidden_state for m in (adapted.base_model.model, merged)]
    assert (trunk[0] - trunk[1]).abs().max() < 1e-4


def test_jointly_with_generation(tmp_path: Path) -> None:
    draw, words = random.Random(0), "one two three four five six".split()

    def pair(table: dict[str, str]) -> dict:
        text = [draw.choice(words) for _ in range(draw.randint(1, 4))]
        return {"source": " ".join(text), "target": " ".join(table[word] for word in text)}

    upper = {word: word.upper() for word in words}
    digits = {word: str(i + 1) for i, word in enumerate(words)}
    texts = [" ".join([*words, *upper.values(), *digits.values()])] * 3
    make_tokenizer(tmp_path / "tokenizer", texts, 300)
    config = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0}
    common = {"task": "translation", "global_batch": 16, "learning_rate": 1.0e-2, "max_length": 24}
    common |= {"generation": {"max_new_tokens": 12}}
    stages = [
        {"name": "source", "data": _files(tmp_path, "up", [pair(upper) for _ in range(96)]), **common},
        {
            "name": "target",
            "data": _files(tmp_path, "no", [pair(digits) for _ in range(48)]) | {"prefix": "number: "},
            "steps": 30,
            **common | {"global_batch": 6},
        },
    ]
    model = {"config": config, "tokenizer": str(tmp_path / "tokenizer")}
    (tmp_path / "joint.yaml").write_text(
        yaml.safe_dump({"model": model, "stages": stages, "transfer": "joint", "log_samples": True})
    )
    command = _command(
        tmp_path, str(tmp_path / "joint.yaml"), "--workers", "2", "--seeds", "1", "--name", "joint"
    )
    result = _run(command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    run_dir = tmp_path / "joint-seeds" / "seed-0"
    together = _summary(tmp_path / "joint-seeds")
    stages_told = _summary(run_dir)["stages"]
    assert together["stages"]["target"]["metrics"]["bleu"]["mean"] == stages_told["target"]["metrics"]["bleu"]
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    for event in steps:
        assert event["loss"] == pytest.approx(sum(event["losses"].values()))
    assert steps[0]["samples"] == 22
    assert "sacrebleu" in json.dumps(stages_told["target"]["notes"]) or "tok:13a" in json.dumps(
        stages_told["target"]["notes"]
    )
    again = _evaluated(run_dir, "target")
    for name in ("source", "target"):
        shown = _shown(run_dir, name)
        assert len(shown["samples"]) == shown["num"] <= shown["of"] and shown["task"] == "translation"
        assert all(each["expected"].split() and each["score"] <= 100 for each in shown["samples"])
    for name in ("bleu", "chrf"):
        assert again[name] == stages_told["target"]["metrics"][name]
