"""What each type of label means: held against transformers' own losses, numpy, and small things to learn."""

import numpy as np
import pytest
import torch

from launcher.errors import DataError
from tests.tasks.texts import Rows, bert, lists, make, refuse, word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()


TRUE = {
    "single": torch.tensor([0, 1, 2, 2, 1, 0]),
    "multiple": torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]),
    "number": torch.tensor([0.5, -3.25, 1e-3, 7.0, 0.0, -100.0]),
}
TYPES = list(TRUE)


def stored(label_type):
    """The labels as a batch has them."""
    true = TRUE[label_type]
    return true.view(torch.int32).long() if label_type == "number" else true


@pytest.mark.parametrize("label_type", TYPES)
def test_loss_is_that_of_transformers(label_type):
    model, task = bert(label_type), make(label_type=label_type)
    ids = torch.randint(4, 9, (6, 5))
    true = TRUE[label_type]
    reference = model(input_ids=ids, labels=true.float() if label_type == "multiple" else true)
    batch = {"input_ids": ids, "labels": stored(label_type)}
    logits = task.outputs(model, None, batch)
    torch.testing.assert_close(task.loss(logits, batch), reference.loss * 6)
    # A row that is left out takes its part of the loss with it.
    some = {"input_ids": ids, "labels": stored(label_type).clone()}
    some["labels"][4:] = -100
    reference = model(input_ids=ids[:4], labels=true[:4].float() if label_type == "multiple" else true[:4])
    torch.testing.assert_close(task.loss(logits, some), reference.loss * 4)


@pytest.mark.parametrize("label_type", TYPES)
def test_nothing_to_learn_is_exactly_zero(label_type):
    task = make(label_type=label_type)
    width = 1 if label_type == "number" else 3
    logits = torch.randn(6, width, dtype=torch.bfloat16, requires_grad=True)
    batch = {"labels": torch.full_like(stored(label_type), -100)}
    loss = task.loss(logits, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0.0 and not logits.grad.any()
    sums = task.measure(logits, batch, loss)
    assert sums.dtype == torch.float64 and not sums.any()
    assert task.metric in task.metrics(sums)


def rounded(sums):
    return (sums * 2**20).round() / 2**20


@pytest.mark.parametrize("label_type", TYPES)
def test_parts_in_any_order_measure_as_the_whole(label_type):
    task = make(label_type=label_type)
    draw = torch.Generator().manual_seed(1)
    true = stored(label_type).repeat(*([5, 1] if label_type == "multiple" else [5]))
    true[3] = -100
    logits = torch.randn(30, 1 if label_type == "number" else 3, generator=draw)

    def sums(part):
        batch = {"labels": true[part]}
        return rounded(task.measure(logits[part], batch, task.loss(logits[part], batch)))

    parts = [sums(slice(i, i + 4)) for i in range(0, 30, 4)]
    metrics = task.metrics(sum(parts))
    assert metrics == task.metrics(sum(reversed(parts)))
    assert metrics == pytest.approx(task.metrics(sums(slice(None))), rel=1e-6)


def test_metrics_of_several_labels():
    task = make(label_type="multiple")
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [-100] * 4, [0, 1, 0, 0]])
    said = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    logits = said * 2.0 - 1
    metrics = task.metrics(task.measure(logits, {"labels": true}, task.loss(logits, {"labels": true})))
    # Hits, predicted, true: 2 3 2; 1 1 2; 1 1 1; the fourth label never occurs.
    assert metrics["micro_f1"] == pytest.approx(2 * 4 / (5 + 5))
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    assert metrics["exact_match"] == pytest.approx(2 / 4)
    assert task.metric == "micro_f1" and task.is_better_high
    known = true[[0, 1, 2, 4]].float()
    reference = torch.nn.functional.binary_cross_entropy_with_logits(logits[[0, 1, 2, 4]], known)
    assert metrics["loss"] == pytest.approx(reference.item())


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-4, 0.0), (50.0, 2000.0)])
def test_metrics_of_numbers(scale, shift):
    task = make(label_type="number")
    draw = np.random.default_rng(0)
    true = (draw.normal(size=40) * scale + shift).astype(np.float32)
    said = (true + draw.normal(size=40) * scale).astype(np.float32)
    batch = {"labels": torch.from_numpy(true.view(np.int32)).long()}
    logits = torch.from_numpy(said)[:, None]
    total = 0
    for i in range(0, 40, 8):
        part = {"labels": batch["labels"][i : i + 8]}
        total = total + rounded(task.measure(logits[i : i + 8], part, task.loss(logits[i : i + 8], part)))
    metrics = task.metrics(total)
    x, y = said.astype(np.float64), true.astype(np.float64)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-3)
    assert metrics["mse"] == pytest.approx(((x - y) ** 2).mean(), rel=1e-3)
    assert metrics["mae"] == pytest.approx(np.abs(x - y).mean(), rel=1e-3)
    assert task.metric == "pearson" and task.is_better_high
    constant = torch.full_like(logits, shift + 0.1)
    sums = task.measure(constant, batch, task.loss(constant, batch))
    assert task.metrics(rounded(sums))["pearson"] == 0.0


def test_features_of_several_labels(tokenizer):
    task = make(tokenizer, label_type="multiple")
    rows = Rows({"text": ["good", "bad", "film"], "label": [["x", "z"], [], ["y", "y"]]})
    assert task.labels([rows, Rows({"label": ["w", "x"]})]) == ("w", "x", "y", "z")
    made = task.features(rows, ("w", "x", "y", "z"), refuse)
    assert lists(made.ragged["labels"]) == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert made.ragged["labels"][0].dtype == np.uint8 and set(made.scalars) == {"num_targets"}
    assert made.scalars["num_targets"].tolist() == [1, 1, 1]
    numbers = Rows({"text": ["good", "bad"], "label": [[7], [3, 7]]})
    made = make(tokenizer, label_type="multiple").features(numbers, ("3", "7"), refuse)
    assert lists(made.ragged["labels"]) == [[0, 1], [1, 1]]
    named = make(tokenizer, label_type="multiple", labels=["w", "x"])
    made = named.features(Rows({"text": ["good"], "label": [[1]]}), ("w", "x"), refuse)
    assert lists(made.ragged["labels"]) == [[0, 1]]
    none = task.features(Rows({"text": [], "label": []}), ("w", "x"), refuse)
    assert set(none.ragged) == {"input_ids", "token_type_ids", "labels"}


def test_features_of_numbers(tokenizer):
    task = make(tokenizer, label_type="number", columns={"label": "score"})
    rows = Rows({"text": ["good", "bad", "film"], "score": [0.1, -100, 3]})
    assert task.label_column is None and task.labels([rows]) == ()
    assert task.columns(["text", "score"]) == ["text", "score"]
    labels = task.features(rows, (), refuse).scalars["labels"]
    assert labels.dtype == np.int32
    assert labels.view(np.float32).tolist() == np.array([0.1, -100, 3], dtype=np.float32).tolist()
    assert np.isnan(np.array([-100], dtype=np.int32).view(np.float32)[0])
    with pytest.raises(DataError, match="label_type: number has no labels"):
        make(label_type="number", labels=["a", "b"])


@pytest.mark.parametrize(
    ("label_type", "values", "said"),
    [
        ("multiple", [["n"], None], 'column "label" is empty (null): label_type: multiple needs a list'),
        ("multiple", [["n"], "n"], 'column "label" is a str: label_type: multiple needs a list'),
        ("multiple", [["n"], ["p", None]], 'column "label" holds empty (null): a label is a word or'),
        ("multiple", [["n"], ["p", "z"]], 'label "z" does not occur in the train split'),
        ("number", [1.0, None], 'column "label" is empty (null): label_type: number needs a finite number'),
        ("number", [1.0, True], 'column "label" is a bool:'),
        ("number", [1.0, float("nan")], 'column "label" is nan:'),
        ("number", [1.0, 1e300], 'column "label" is 1e+300:'),
        ("number", [1.0, 10**400], 'column "label" is a int:'),
        ("number", [1.0, "1.0"], 'column "label" is a str:'),
    ],
)
def test_rows_without_such_a_label(tokenizer, label_type, values, said):
    told = []
    rows = Rows({"text": ["good", "bad"], "label": values})
    task = make(tokenizer, label_type=label_type)
    made = task.features(rows, ("", "n", "p"), lambda where, why: told.append(f"{where}: {why}"))
    assert len(told) == 1 and f"row 2: {said}" in told[0] and "\n" not in told[0]
    assert lists(made.ragged["input_ids"]) == [[2, 4, 3]] and len(made.scalars["num_targets"]) == 1


@pytest.fixture
def one_thread():
    """Many small steps: threads that wait for each other, on a machine with other work, take far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learnt(label_type, tokenizer, rows, words):
    """A tiny Bert that has learnt some rows, its task, and the rows as a batch."""
    task = make(tokenizer, label_type=label_type)
    made = task.features(rows, words, refuse)
    made_ids = lists(made.ragged["input_ids"])
    batch = {
        "input_ids": torch.tensor(made_ids),
        "attention_mask": torch.ones(len(made_ids), len(made_ids[0]), dtype=torch.int64),
    }
    labels = lists(made.ragged["labels"]) if "labels" in made.ragged else made.scalars["labels"].tolist()
    batch["labels"] = torch.tensor(labels, dtype=torch.int64)
    model = bert(label_type, words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = task.loss(task.outputs(model, None, batch), batch) / len(made_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, task, batch


LINES = ["a good film", "a bad film", "very good film", "very bad film"]


@pytest.mark.usefixtures("one_thread")
def test_several_labels_are_learnt(tokenizer):
    truth = [["good"], ["bad"], ["good", "very"], ["bad", "very"]]
    rows = Rows({"text": LINES, "label": truth})
    model, task, batch = learnt("multiple", tokenizer, rows, ("bad", "good", "very"))
    with torch.no_grad():
        logits = task.outputs(model, None, batch)
    metrics = task.metrics(task.measure(logits, batch, task.loss(logits, batch)))
    assert metrics["micro_f1"] == metrics["macro_f1"] == metrics["exact_match"] == 1.0
    assert task.answers(logits, batch) == [{"prediction": t, "reference": t} for t in truth]
    assert task.predict(model, None, tokenizer, LINES) == ["good", "bad", "good,very", "bad,very"]
    batch["labels"] = torch.zeros_like(batch["labels"])
    answers = task.answers(torch.full_like(logits, -1.0), batch)
    assert answers == [{"prediction": [], "reference": []}] * 4


@pytest.mark.usefixtures("one_thread")
def test_numbers_are_learnt(tokenizer):
    truth = [1.0, -1.0, 2.0, -2.0]
    rows = Rows({"text": LINES, "label": truth})
    model, task, batch = learnt("number", tokenizer, rows, ())
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    with torch.no_grad():
        logits = task.outputs(model, None, batch)
    metrics = task.metrics(task.measure(logits, batch, task.loss(logits, batch)))
    assert metrics["pearson"] > 0.99 and metrics["mae"] < 0.2 and metrics["mse"] < 0.05
    answers = task.answers(logits, batch)
    assert [answer["reference"] for answer in answers] == truth
    said = task.predict(model, None, tokenizer, LINES)
    assert [float(line) for line in said] == pytest.approx([a["prediction"] for a in answers], abs=1e-4)
    assert all(len(line.partition(".")[2]) == 4 for line in said)


def test_answers_of_one_label(tokenizer):
    task = make(tokenizer)
    task.model_options(("n", "p"))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    answers = task.answers(logits, {"labels": torch.tensor([0, 0, -100])})
    assert [(a["prediction"], a["reference"]) for a in answers] == [("n", "n"), ("p", "n"), ("p", None)]
