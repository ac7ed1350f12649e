"""What text-classification learns from: checked with a tiny word tokenizer and a tiny Bert."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from launcher import predict, recipe
from launcher.errors import DataError
from tests.tasks.texts import WORDS, Rows, bert, lists, make, refuse, word_tokenizer

ROWS = Rows({"text": ["a good film", "bad", "a very very bad film"], "label": ["pos", "neg", "neg"]})


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def test_features(tokenizer):
    task = make(tokenizer, max_length=5)
    labels = task.labels([ROWS, ROWS])
    assert labels == ("neg", "pos")
    made = task.features(ROWS, labels, refuse)
    assert lists(made.ragged["input_ids"]) == [[2, 7, 4, 6, 3], [2, 5, 3], [2, 7, 8, 8, 3]]
    assert made.scalars["labels"].tolist() == [1, 0, 0]
    assert made.scalars["num_targets"].tolist() == [1, 1, 1]
    assert [set(t) for t in lists(made.ragged["token_type_ids"])] == [{0}] * 3
    assert (made.num_skipped, made.num_cut, made.num_cut_tokens) == (0, 1, 2)
    assert tokenizer.backend_tokenizer.truncation is None
    assert made.ragged["input_ids"][0].dtype == np.uint16
    assert made.ragged["token_type_ids"][0].dtype == np.uint8
    assert {values.dtype for values in made.scalars.values()} == {np.dtype(np.int32)}
    assert task.one_sample_per_row and task.loss_unit == "sample"
    none = task.features(Rows({"text": [], "label": []}), labels, refuse)
    assert set(none.ragged) == {"input_ids", "token_type_ids"} and not len(none.scalars["labels"])


def test_pairs_and_mapping(tokenizer):
    task = make(tokenizer, columns={"text": "s1", "text_pair": "s2"})
    rows = Rows({"s1": ["good"], "s2": ["bad film"], "label": [1]})
    assert task.columns(["s1", "s2", "label", "id"]) == ["s1", "s2", "label"]
    made = task.features(rows, ("0", "1"), refuse)
    assert lists(made.ragged["input_ids"]) == [[2, 4, 3, 5, 6, 3]]
    assert lists(made.ragged["token_type_ids"]) == [[0, 0, 0, 1, 1, 1]]


def test_rows_rejected_are_left_out(tokenizer):
    said = []
    columns = {
        "text": ["good", None, "bad", "film", "very"],
        "text_pair": ["a", "a", "a", 3, "film"],
        "label": ["n", None, ["n"], "p", "z"],
    }
    made = make(tokenizer).features(Rows(columns), ("n", "p"), lambda where, why: said.append((where, why)))
    assert lists(made.ragged["input_ids"]) == [[2, 4, 3, 7, 3]] and made.scalars["labels"].tolist() == [0]
    assert sorted(where for where, _ in said) == [f"a.jsonl, row {i}" for i in (2, 3, 4, 5)]
    assert 'column "label" is a list: a label is a word or an integer' in dict(said)["a.jsonl, row 3"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("is_pair", [False, True])
def test_what_is_cut_is_counted_and_cut_as_transformers_does(tokenizer, side, is_pair):
    words = WORDS[4:]
    texts = [" ".join(words[i % 5] for i in range(n)) for n in (0, 1, 4, 5, 6, 12, 40)]
    others = [" ".join(words[i % 3] for i in range(n)) for n in (3, 0, 1, 9, 1, 12, 2)]
    columns = {"text": texts, **({"text_pair": others} if is_pair else {}), "label": ["n"] * 7}
    tokenizer.truncation_side = side
    made = make(tokenizer, max_length=8).features(Rows(columns), ("n", "p"), refuse)
    inputs = (texts, others) if is_pair else (texts,)
    expected = tokenizer(*inputs, truncation=True, max_length=8)
    tokenizer.backend_tokenizer.no_truncation()
    assert lists(made.ragged["input_ids"]) == expected["input_ids"]
    assert lists(made.ragged["token_type_ids"]) == expected["token_type_ids"]
    lost = [max(0, len(ids) - 8) for ids in tokenizer(*inputs)["input_ids"]]
    assert (made.num_cut, made.num_cut_tokens) == (sum(n > 0 for n in lost), sum(lost))
    assert made.num_cut > 1


def test_labels(tokenizer):
    texts = {"text": ["a"] * 3}
    assert make().labels([Rows({**texts, "label": [10, 9, 2]})]) == ("2", "9", "10")
    named = make(tokenizer, labels=["neg", "pos"])
    assert named.labels([]) == ("neg", "pos")
    for given in ([1, 0, 1], ["pos", "neg", "pos"], ["pos", False, 1]):
        made = named.features(Rows({**texts, "label": given}), ("neg", "pos"), refuse)
        assert made.scalars["labels"].tolist() == [1, 0, 1]
    made = make(tokenizer).features(Rows({**texts, "label": [1, True, "1"]}), ("1", "True"), refuse)
    assert made.scalars["labels"].tolist() == [0, 1, 0]
    assert make().labels([Rows({"label": ["b", None, "a"]})]) == ("a", "b")
    assert make().model_options(("n", "p")) == {
        "num_labels": 2,
        "id2label": {0: "n", 1: "p"},
        "label2id": {"n": 0, "p": 1},
        "problem_type": "single_label_classification",
    }
    with pytest.raises(DataError, match="1 label.s."):
        make().labels([Rows({**texts, "label": ["x"] * 3})])


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ({}, {"text": ["a", None], "label": ["n", "n"]}, 'row 2: column "text" is empty'),
        ({}, {"text": ["a"], "label": [None]}, 'row 1: column "label" is empty'),
        ({}, {"text": ["a"], "label": ["z"]}, 'row 1: label "z" does not occur in the train split'),
        ({"labels": ["n", "p"]}, {"text": ["a"], "label": [-1]}, 'label "-1" is not among'),
        ({}, {"txt": ["a"], "label": ["n"]}, 'no column "text" (did you mean "txt"?)'),
    ],
)
def test_unusable_rows(tokenizer, data, columns, said):
    with pytest.raises(DataError) as caught:
        make(tokenizer, **data).features(Rows(columns), ("n", "p"), refuse)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_misspelt_mapping_is_refused():
    with pytest.raises(DataError, match='no column "txt" .did you mean "text"'):
        make(columns={"txt": "sentence"}).columns(["sentence", "label"])


def test_metrics_add_up():
    task = make()
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    true = torch.tensor([0, 1, 1, 1, 0, -100])
    logits = torch.nn.functional.one_hot(predicted, 3).float()

    def sums(part):
        batch = {"labels": true[part]}
        return task.measure(logits[part], batch, task.loss(logits[part], batch))

    whole = sums(slice(None))
    torch.testing.assert_close(sums(slice(0, 2)) + sums(slice(2, 6)), whole, rtol=1e-6, atol=1e-6)
    metrics = task.metrics(whole)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    # Class 0: 1 hit of 2 predicted and 2 true; class 1: 2 hits of 3 and 3; class 2 never occurs.
    assert metrics["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_predict_command(tokenizer, tmp_path, capsys):
    described = recipe.parse(
        {
            "model": {"path": "m"},
            "stages": [{"name": "s", "task": "text-classification", "data": {"train": "x"}}],
        }
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(described))
    lines = ["good film", "a very bad film", ""] * 15
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
    model = bert()
    model.save_pretrained(tmp_path / "stages" / "s" / "export")
    tokenizer.save_pretrained(tmp_path / "stages" / "s" / "export")
    assert predict.main([str(tmp_path), "--input", str(tmp_path / "lines")]) == 0
    answers = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        best = [model(**tokenizer(x, return_tensors="pt")).logits.argmax(-1).item() for x in lines]
    assert answers == [model.config.id2label[i] for i in best]
    assert predict.main([str(tmp_path / "nowhere")]) == 2
    assert predict.main([str(tmp_path), "--input", str(tmp_path / "nowhere")]) == 2


def test_tasks_and_help_need_no_torch():
    code = "import sys, launcher.predict, launcher.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
