"""Tags on words: alignment, entities counted as seqeval does, bad rows, and a toy that is learnt."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score

from launcher import recipe as recipes
from launcher.data.source import Rows
from launcher.errors import DataError
from launcher.tasks import tags
from launcher.tasks.token_classification import TokenClassification
from tests.tasks.words import tagger, word_piece

LABELS = ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
WORDS = ["unbelievable", "Hamburg", "is", "a", "cityscape", "of", "Angela", "Merkel"]


def _task(tokenizer=None, max_length: int = 32, head: str = "linear", **data) -> TokenClassification:
    stage = {"name": "a", "task": "token-classification", "head": head, "data": {"train": "x.jsonl", **data}}
    task = TokenClassification(recipes.Stage.model_validate(stage))
    task.model_options(LABELS)
    if tokenizer is not None:
        task.set_tokenizer(tokenizer, max_length)
    return task


def _rows(words: list, own: list) -> Rows:
    return Rows("x.jsonl", {"tokens": words, "tags": own}, range(len(words)))


def _refuse(where: str, reason: str) -> None:
    raise DataError(f"{where}: {reason}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("words")
    return word_piece(folder, ["un believ able Ham burg is a city of Ang ela Mer kel"], 60)


def test_the_first_token_of_each_word_bears_its_tag(tokenizer) -> None:
    sentences = [["unbelievable", "Hamburg", "is"], ["Angela", "Merkel"]]
    own = [["O", "B-LOC", "O"], ["B-PER", "I-PER"]]
    made = _task(tokenizer).features(_rows(sentences, own), LABELS, _refuse)
    ids, lengths = made.ragged["input_ids"]
    labels, label_lengths = made.ragged["labels"]
    assert (lengths == label_lengths).all() and made.scalars["num_targets"].tolist() == [3, 2]
    at = 0
    for words, wanted, length in zip(sentences, own, lengths, strict=True):
        reference = tokenizer(words, is_split_into_words=True)
        assert ids[at : at + length].tolist() == reference["input_ids"]
        seen, expected = None, []
        for word in reference.word_ids():
            is_first = word is not None and word != seen
            expected.append(LABELS.index(wanted[word]) if is_first else -100)
            seen = word
        assert labels[at : at + length].tolist() == expected
        at += length


def test_what_is_too_long_is_cut_and_counted(tokenizer) -> None:
    made = _task(tokenizer, max_length=8).features(_rows([WORDS], [["O"] * 8]), LABELS, _refuse)
    whole = len(tokenizer(WORDS, is_split_into_words=True)["input_ids"])
    assert made.ragged["input_ids"][1].tolist() == [8]
    assert made.ragged["input_ids"][0][-1] == tokenizer.sep_token_id
    assert (made.num_cut, made.num_cut_tokens) == (1, whole - 8)


@pytest.mark.parametrize(
    ("words", "own", "told"),
    [
        (["a", "b"], ["O"], "2 words but 1 tags"),
        (["a", "b"], ["O", "I-PER"], 'tag of word 2, "I-PER", cannot stand after "O"'),
        (["a"], ["I-LOC"], "at the begin"),
        (["a", "b"], ["B-PER", "I-LOC"], 'cannot stand after "B-PER"'),
        (["a"], ["PER"], '"PER" is no tag of IOB2'),
        (["a"], ["B-PRE"], 'did you mean "B-PER"'),
        (["a"], [3], "name the tags in data.labels"),
        (None, ["O"], "empty (null)"),
        (["a", None], ["O", "O"], "word 2 is empty (null)"),
        ([], [], "without words"),
        ("a b", ["O"], "it must be a list"),
    ],
)
def test_bad_rows_are_told(tokenizer, words, own, told: str) -> None:
    with pytest.raises(DataError) as error:
        _task(tokenizer).features(_rows([words], [own]), LABELS, _refuse)
    assert told in str(error.value) and "x.jsonl" in str(error.value)


def test_bad_rows_can_be_left_out(tokenizer) -> None:
    told: list[str] = []
    rows = _rows([["a"], ["is"], ["a"]], [["O"], ["I-PER"], ["B-PER"]])
    made = _task(tokenizer).features(rows, LABELS, lambda where, reason: told.append(where))
    assert len(told) == 1 and made.scalars["num_targets"].tolist() == [1, 1]


def test_labels_are_found_and_numbers_need_names(tokenizer) -> None:
    found = _task().labels([Rows("x", {"tags": ["B-PER", "O", ["I-PER", "O"]]}, range(3))])
    assert found == ("O", "B-PER", "I-PER")
    task = _task(tokenizer, labels=list(LABELS))
    made = task.features(_rows([["a", "Hamburg"]], [[0, 1]]), LABELS, _refuse)
    assert [i for i in made.ragged["labels"][0].tolist() if i != -100] == [0, 1]
    with pytest.raises(DataError, match="tag 9: data.labels names 5 tags"):
        task.features(_rows([["a"]], [[9]]), LABELS, _refuse)


sequences = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(true=sequences, seed=st.integers(0, 1000))
def test_metrics_are_seqevals_in_any_split(true: list[list[int]], seed: int) -> None:
    draw = random.Random(seed)
    task, longest = _task(), max(map(len, true))
    labels = torch.full((len(true), longest), -100)
    for i, row in enumerate(true):
        labels[i, : len(row)] = torch.tensor(row)
    said = [[draw.randrange(5) for _ in row] for row in true]
    outputs = torch.zeros(len(true), longest, 5)
    for i, row in enumerate(said):
        outputs[i, range(len(row)), row] = 5.0

    def sums(part: slice) -> torch.Tensor:
        batch = {"labels": labels[part]}
        return task.measure(outputs[part], batch, task.loss(outputs[part], batch))

    cut = draw.randrange(len(true) + 1)
    parts = [sums(part) for part in (slice(0, cut), slice(cut, None)) if len(labels[part])]
    found = task.metrics(sum(parts))
    words = [[[LABELS[i] for i in row] for row in rows] for rows in (true, said)]
    expected = [f(*words, zero_division=0) for f in (f1_score, precision_score, recall_score)]
    assert [found["f1"], found["precision"], found["recall"]] == pytest.approx(expected, abs=1e-12)
    answers = task.answers(outputs, {"labels": labels})
    assert [a["reference"] for a in answers] == words[0] and [a["prediction"] for a in answers] == words[1]


def test_a_stand_in_adds_nothing() -> None:
    task, batch = _task(), {"labels": torch.full((1, 4), -100)}
    outputs = torch.randn(1, 4, 5, requires_grad=True)
    loss = task.loss(outputs, batch)
    loss.backward()
    assert float(loss.detach()) == 0 and not outputs.grad.any()
    assert not task.measure(outputs.detach(), batch, loss.detach()).any()


def test_what_may_follow_what() -> None:
    def breaks(*own: str, iobes: bool = True) -> int | None:
        return tags.first_break(own, iobes=iobes)

    assert breaks("B-X", "I-X", "O", "B-Y", iobes=False) is None
    assert breaks("B-X", "I-X", "O", "B-Y") == 2
    assert breaks("B-X", "E-X", "S-Y", "O") is None
    assert breaks("B-X", "I-X", "S-Y") == 2
    assert breaks("O", "B-X", "E-Y") == 2
    assert breaks("S-X", "B-X") == 1  # in IOBES an entity has to end


def test_words_without_a_token_keep_their_place(tokenizer) -> None:
    task = _task(tokenizer)
    model = tagger(tokenizer, task.model_options(LABELS)).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0]))
    assert task.predict(model, None, tokenizer, ["is \u200b a"]) == ["B-LOC O B-LOC"]


def test_a_constrained_chain_has_whole_entities_only(tokenizer) -> None:
    stage = {"name": "a", "task": "token-classification", "data": {"train": "x.jsonl"}}
    stage["head"] = {"kind": "crf", "constrained": True}
    task = TokenClassification(recipes.Stage.model_validate(stage))
    task.set_tokenizer(tokenizer, 8)
    rows = _rows(
        [["is", "\u200b", "Merkel"], ["a", *["Hamburg"] * 3, "a"]],
        [["O", "B-PER", "I-PER"], ["O", "B-LOC", "I-LOC", "I-LOC", "O"]],
    )
    made = task.features(rows, LABELS, _refuse)
    values, lengths = made.ragged["labels"]
    chains = [[LABELS[i] for i in row if i != -100] for row in np.split(values, np.cumsum(lengths)[:-1])]
    assert chains == [["O"], ["O"]]


def test_only_tags_become_labels() -> None:
    assert _task().labels([Rows("x", {"tags": ["PER", "O", 3, "B-X"]}, range(4))]) == ("O", "B-X")
    with pytest.raises(DataError, match="data.labels"):
        _task(labels=["PER", "LOC"]).labels([])


def test_byte_level_words_begin_with_a_space(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import make_tokenizer

    folder = make_tokenizer(tmp_path, ["the river holds the river holds"] * 20, 300)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = _task(tokenizer)
    made = task.features(_rows([["the", "river"]], [["O", "B-LOC"]]), LABELS, _refuse)
    ids = made.ragged["input_ids"][0].tolist()
    assert ids == tokenizer(" the river", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("head", ["linear", "crf"])
def test_a_toy_rule_is_learnt_and_predicted(tokenizer, head: str) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    task = _task(tokenizer, head=head)
    model, extra = tagger(tokenizer, task.model_options(LABELS), 32), task.extra(LABELS)
    rule = {"Hamburg": "B-LOC", "Angela": "B-PER", "Merkel": "I-PER"}
    sentences = []
    for _ in range(32):
        start = draw.sample(["is", "a", "of", "Hamburg"], 3)
        sentences.append([*start, *(["Angela", "Merkel"] if draw.random() < 0.5 else [])])
    own = [[rule.get(word, "O") for word in words] for words in sentences]
    made = task.features(_rows(sentences, own), LABELS, _refuse)
    lengths = made.ragged["input_ids"][1]
    inside = np.arange(lengths.max()) < lengths[:, None]

    def rectangle(name: str, fill: int) -> torch.Tensor:
        values = np.full(inside.shape, fill, dtype=np.int64)
        values[inside] = made.ragged[name][0]
        return torch.from_numpy(values)

    batch = {"input_ids": rectangle("input_ids", 0), "labels": rectangle("labels", -100)}
    batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
    parameters = [*model.parameters(), *(extra.parameters() if extra is not None else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(40):
        loss = task.loss(task.outputs(model, extra, batch), batch) / made.scalars["num_targets"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        outputs = task.outputs(model, extra, batch)
        metrics = task.metrics(task.measure(outputs, batch, task.loss(outputs, batch)))
    assert metrics["f1"] > 0.95
    lines = [" ".join(words) for words in sentences[:5]]
    assert task.predict(model, extra, tokenizer, [*lines, ""]) == [*(" ".join(row) for row in own[:5]), ""]


def test_real_sentences_keep_their_tags() -> None:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from tests.conftest import SHARED_DATA

    file = SHARED_DATA / "wikiann" / "de" / "dev.parquet"
    if not file.exists():
        pytest.skip("needs the real data sets beside the checkout")
    table = pq.read_table(file).slice(0, 500).to_pydict()
    labels = _task().labels([Rows("x", {"tags": table["tags"]}, range(500))])
    folder = Path(__file__).parent.parent.parent / "launcher" / "recipes" / "quickstart" / "model"
    task = _task(AutoTokenizer.from_pretrained(folder), max_length=512)
    made = task.features(_rows(table["tokens"], table["tags"]), labels, _refuse)
    values, flat = made.ragged["labels"][0], [labels.index(t) for row in table["tags"] for t in row]
    assert values[values != -100].tolist() == flat
