"""Evaluating a finished run again: against a plain loop over a small model, on the run's data and on others."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from launcher import evaluate, recipe, storage
from tests.conftest import ROOT, write_jsonl
from tests.tasks.texts import WORDS, bert, word_tokenizer

DRAW = np.random.default_rng(0)
TEXTS = [" ".join(DRAW.choice(WORDS[4:], size=size)) for size in DRAW.integers(1, 12, size=50)]
LABELS = {
    "single": [int(i) for i in DRAW.choice([2, 3, 5], size=50)],
    "multiple": [
        [str(w) for w in DRAW.choice(["a", "b", "c"], size=n)] for n in DRAW.integers(0, 4, size=50)
    ],
    "number": [float(x) for x in DRAW.normal(size=50)],
}
# As numbers they would be other places among themselves.
WORDS_OF = {"single": ("2", "3", "5"), "multiple": ("a", "b", "c"), "number": ()}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other, on a machine with other work, take far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(folder, label_type="single", model=None, **stage):
    """A run directory with one finished stage `a`, and one `b` that is not."""
    rows = [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS[label_type], strict=True)]
    train = write_jsonl(folder / "train.jsonl", rows[:10])
    held_out = write_jsonl(folder / "eval.jsonl", rows)
    common = {"task": "text-classification", "max_length": 10, **stage}
    data = {"train": str(train), "eval": str(held_out), "label_type": label_type}
    described = recipe.parse(
        {
            "model": {"path": str(folder / "nowhere")},
            "stages": [
                {"name": "a", "data": data, **common},
                {"name": "b", "data": {**data, "eval": None}, **common},
            ],
        }
    )
    run_dir = folder / "run"
    storage.write_text(run_dir / "recipe.yaml", recipe.to_yaml(described))
    shutil.copy(ROOT / "ds_configs" / "zero0.json", run_dir / "ds.json")
    model = model or varied(bert(label_type, WORDS_OF[label_type]))
    model.save_pretrained(run_dir / "stages" / "a" / "export")
    word_tokenizer().save_pretrained(run_dir / "stages" / "a" / "export")
    return run_dir, model, held_out


def run(capsys, *arguments):
    """Return the metrics that evaluate prints, and those of the run beside them."""
    assert evaluate.main([str(each) for each in arguments]) == 0
    parts = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {p[0]: float(p[1]) for p in parts}, {p[0]: float(p[-1]) for p in parts if len(p) > 2}


def varied(model):
    """Move the bias so that not all texts get the same answer."""
    with torch.no_grad():
        model.classifier.bias -= plain_logits(model, TEXTS).mean(0)
    return model


def plain_logits(model, texts):
    """One text after another, without padding."""
    tokenizer = word_tokenizer()
    with torch.no_grad():
        encoded = [tokenizer(t, truncation=True, max_length=10, return_tensors="pt") for t in texts]
        return torch.cat([model(**each).logits for each in encoded]).double()


def test_one_label(tmp_path, capsys):
    run_dir, model, _ = make_run(tmp_path)
    storage.write_json(run_dir / "stages" / "a" / "done.json", {"metrics": {"accuracy": 0.25}})
    metrics, of_run = run(capsys, run_dir, "--stage", "a", "--predictions", tmp_path / "said.jsonl")
    logits = plain_logits(model, TEXTS)
    true = torch.tensor([WORDS_OF["single"].index(str(y)) for y in LABELS["single"]])
    best = logits.argmax(-1)
    assert metrics["accuracy"] == (best == true).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, true)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    f1 = [2 * ((best == i) & (true == i)).sum() / ((best == i).sum() + (true == i).sum()) for i in range(3)]
    assert metrics["macro_f1"] == pytest.approx(float(sum(f1) / 3))
    assert of_run == {"accuracy": 0.25}
    # One line a row, in the order of the file, not of the batches.
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in said] == [str(y) for y in LABELS["single"]]
    assert [row["prediction"] for row in said] == [WORDS_OF["single"][i] for i in best]
    assert len({row["prediction"] for row in said}) > 1


def test_many_labels_and_numbers(tmp_path, capsys):
    run_dir, model, _ = make_run(tmp_path, "multiple")
    metrics, _ = run(capsys, run_dir, "--stage", "a", "--predictions", tmp_path / "said.jsonl")
    said = plain_logits(model, TEXTS) > 0
    true = torch.tensor([[word in labels for word in "abc"] for labels in LABELS["multiple"]])
    assert metrics["micro_f1"] == pytest.approx((2 * (said & true).sum() / (said.sum() + true.sum())).item())
    assert metrics["exact_match"] == (said == true).all(-1).double().mean().item()
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == [sorted(set(labels)) for labels in LABELS["multiple"]]
    assert [row["prediction"] for row in rows] == [
        [w for w, is_said in zip("abc", row, strict=True) if is_said] for row in said.tolist()
    ]
    (tmp_path / "numbers").mkdir()
    run_dir, model, _ = make_run(tmp_path / "numbers", "number")
    metrics, _ = run(capsys, run_dir, "--stage", "a")
    x, y = plain_logits(model, TEXTS)[:, 0].numpy(), np.array(LABELS["number"])
    assert metrics["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert metrics["mse"] == pytest.approx(((x - y) ** 2).mean(), rel=1e-4)


def test_other_data(tmp_path, capsys):
    run_dir, model, _ = make_run(tmp_path)
    storage.write_json(run_dir / "stages" / "a" / "done.json", {"metrics": {"accuracy": 0.25}})
    # Of the three labels only one is there, and labels are still what they were in training.
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": text, "label": 5} for text in TEXTS[:20]])
    metrics, of_run = run(capsys, run_dir, "--stage", "a", "--data", other)
    best = plain_logits(model, TEXTS[:20]).argmax(-1)
    assert metrics["accuracy"] == (best == 2).double().mean().item()
    assert of_run == {}


def test_a_part_kept_for_evaluation(tmp_path, capsys):
    """With eval_fraction the rows are those that the run kept from training."""
    from launcher import facts

    run_dir, model, held_out = make_run(tmp_path)
    described = recipe.parse(
        {
            "model": {"path": str(run_dir / "stages" / "a" / "export")},
            "stages": [
                {
                    "name": "a",
                    "task": "text-classification",
                    "max_length": 10,
                    "data": {"train": str(held_out), "eval_fraction": 0.4},
                }
            ],
        }
    )
    storage.write_text(run_dir / "recipe.yaml", recipe.to_yaml(described))
    run(capsys, run_dir, "--predictions", tmp_path / "said.jsonl")
    said = [json.loads(line)["reference"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    prepared = facts.prepare_all(
        recipe.dump(described), evaluate.sizes.model_facts(described.model), str(tmp_path)
    )
    assert prepared.facts[0].eval is not None and len(said) == prepared.facts[0].eval.num_samples
    assert 0 < len(said) < 50


def test_batches_are_those_of_the_run(tmp_path):
    """The micro-batch of the recipe, else of the ds config, else the token budget; the run's longest sample."""
    run_dir, _, _ = make_run(tmp_path)
    stage = evaluate.finished.find(run_dir, "a")

    def limits(stage, ds):
        asked = evaluate._asked(stage, None)
        plan = evaluate._plan(asked, evaluate.sizes.model_facts(asked.model), ds)
        return (None if plan.budget_tokens else plan.micro_batch), plan.budget_tokens, plan.max_length

    assert limits(stage, {}) == (None, 80, 10)
    ds = {"train_batch_size": 64, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 4}
    assert limits(stage, ds) == (4, None, 10)
    (tmp_path / "tokens").mkdir()
    run_dir, _, _ = make_run(tmp_path / "tokens", micro_batch="40 tokens")
    assert limits(evaluate.finished.find(run_dir, "a"), {}) == (None, 40, 10)


def test_positions_of_the_export_limit_samples(tmp_path, capsys):
    config = BertConfig(**bert(words=WORDS_OF["single"]).config.to_dict() | {"max_position_embeddings": 6})
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    run_dir, _, _ = make_run(tmp_path, model=model, max_length="auto")
    metrics, _ = run(capsys, run_dir, "--stage", "a")
    assert 0 <= metrics["accuracy"] <= 1


def test_answers_to_questions_by_id(tmp_path, capsys):
    """Windows of one context are judged together, and SQuAD's script can read the answers."""
    contexts = ["a very good film", "a bad film a very bad film " * 6, "good", "very bad"]
    rows = [
        {
            "id": f"q{i}",
            "question": "film",
            "context": context,
            "answers": {"text": [context.split()[-1]], "answer_start": [context.rstrip().rfind(" ") + 1]},
        }
        for i, context in enumerate(contexts)
    ]
    run_dir, model, _ = make_run(tmp_path)
    data = write_jsonl(tmp_path / "questions.jsonl", rows)
    asked = {"data": {"train": str(data), "eval": str(data)}, "answers": {"stride": 4}, "max_length": 16}
    stage = {"name": "a", "task": "question-answering", **asked}
    described = recipe.parse({"model": {"path": "m"}, "stages": [stage]})
    storage.write_text(run_dir / "recipe.yaml", recipe.to_yaml(described))
    config = BertConfig(**model.config.to_dict() | {"id2label": {0: "start", 1: "end"}})
    BertForQuestionAnswering(config).save_pretrained(run_dir / "stages" / "a" / "export")
    metrics, _ = run(capsys, run_dir, "--predictions", tmp_path / "said.json")
    said = json.loads((tmp_path / "said.json").read_text())
    assert list(said) == ["q0", "q1", "q2", "q3"]
    assert all(answer and answer in context for answer, context in zip(said.values(), contexts, strict=True))
    right = [said[row["id"]] == row["answers"]["text"][0] for row in rows]
    assert metrics["exact_match"] == 100 * sum(right) / 4
    run(capsys, run_dir, "--predictions", tmp_path / "said.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {line["id"]: line["prediction"] for line in lines} == said
    assert [line["reference"] for line in lines] == [row["answers"]["text"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "c"], '--stage: {run} has no stage "c"'),
        (["--stage", "b"], "no exported model yet: let stage b finish first"),
        ([], "no exported model yet: let stage b finish first"),
        (["--stage", "a", "--data", "{run}/nowhere.jsonl"], "{run}/nowhere.jsonl: "),
        (["--stage", "a", "--data", "{run}/bad.jsonl"], '{run}/bad.jsonl, line 2: label "9" does not occur'),
        (["--stage", "a", "--data", "{run}/other.jsonl"], 'the files have no column "text"'),
        (["--stage", "a", "--predictions", "{run}/x/y"], "--predictions {run}/x/y: there is no directory"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, said):
    run_dir, _, _ = make_run(tmp_path)
    write_jsonl(run_dir / "bad.jsonl", [{"text": "good", "label": 2}, {"text": "bad", "label": 9}])
    write_jsonl(run_dir / "other.jsonl", [{"sentence": "good", "label": 2}])
    assert evaluate.main([str(run_dir), *(each.format(run=run_dir) for each in arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and len(told.err.splitlines()) == 1
    assert said.format(run=run_dir) in told.err


def test_no_run_and_no_data(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "nowhere")]) == 2
    assert "give the directory of a run" in capsys.readouterr().err
    run_dir, _, _ = make_run(tmp_path)
    shutil.copytree(run_dir / "stages" / "a", run_dir / "stages" / "b")
    assert evaluate.main([str(run_dir)]) == 2
    assert "stages.b has no data to evaluate on: give --data FILE" in capsys.readouterr().err
