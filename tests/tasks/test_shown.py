"""What a person sees of answers: of each task by outputs that are known, and how texts are cut."""

import json
import math

import pytest
import sacrebleu
import torch
from torch.nn.functional import one_hot

from launcher.tasks import shown, tokens
from tests.tasks import test_causal_lm as talks
from tests.tasks import test_question_answering as questions
from tests.tasks import test_token_classification as tagged
from tests.tasks import test_translation as translated
from tests.tasks import texts
from tests.tasks.words import word_piece

tokenizer, llama = talks.tokenizer, talks.llama


def classified(label_type, rows, outputs, labels):
    """What is shown of texts with these labels, where the model says these logits."""
    task = texts.make(texts.word_tokenizer(), label_type=label_type)
    task.model_options(labels)
    ids = [task.tokenizer(text)["input_ids"] for text, _ in rows]
    width = max(map(len, ids))
    made = task.features(
        texts.Rows({"text": [t for t, _ in rows], "label": [y for _, y in rows]}), labels, texts.refuse
    )
    of_labels = made.scalars.get("labels")
    if of_labels is None:
        of_labels = made.ragged["labels"][0].reshape(len(rows), -1)
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        "labels": torch.from_numpy(of_labels.astype("int64")),
    }
    return task, batch, task.shown(torch.tensor(outputs), batch)


def test_single_labels():
    rows = [("good film", "yes"), ("bad", "no"), ("a zebra", "no")]
    logits = [[0.0, 2.0], [-1.0, 3.0], [1.0, 0.0]]
    task, batch, found = classified("single", rows, logits, ("no", "yes"))
    # A word that the tokenizer does not know stays to be seen.
    assert [each.input for each in found] == ["good film", "bad", "a [UNK]"]
    assert [(e.expected, e.answer, e.is_right) for e in found] == [
        ("yes", "yes", True),
        ("no", "yes", False),
        ("no", "no", True),
    ]
    assert found[1].score == pytest.approx(1 / (1 + math.exp(-4)))
    assert found[1].badness > found[2].badness > found[0].badness
    outputs = torch.tensor(logits)
    sums = task.measure(outputs, batch, task.loss(outputs, batch))
    assert task.tables(sums) == {"matrix": {"labels": ["no", "yes"], "counts": [[1, 1], [0, 1]]}}
    # Nobody looks at a matrix of so many.
    many = texts.make(label_type="single")
    many.model_options(tuple(map(str, range(101))))
    assert many.tables(torch.zeros(101**2 + 2, dtype=torch.float64)) == {}


def test_many_labels_and_numbers():
    _, _, found = classified(
        "multiple",
        [("good", ["a", "c"]), ("bad", [])],
        [[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]],
        ("a", "b", "c"),
    )
    assert [(e.expected, e.answer, e.is_right, e.score) for e in found] == [
        (["a", "c"], ["a", "b"], False, None),
        ([], [], True, None),
    ]
    assert [e.badness for e in found] == [2, 0]
    _, _, found = classified("number", [("good", 1.5), ("bad", -1.0)], [[1.25], [3.0]], ())
    assert [(e.expected, e.answer, e.is_right, e.score) for e in found] == [
        (1.5, 1.25, None, None),
        (-1.0, 3.0, None, None),
    ]
    assert [e.badness for e in found] == [0.25, 4.0]


def test_pairs_are_told_apart():
    tokenizer = texts.word_tokenizer()
    batch = tokenizer(["good", "a"], ["bad film", "very"], padding=True)
    assert tokens.texts_of(tokenizer, {k: torch.tensor(v) for k, v in batch.items()}) == [
        "good | bad film",
        "a | very",
    ]
    assert tokens.text_of(tokenizer, []) == ""


def test_entities_have_their_words(tmp_path):
    tokenizer = word_piece(tmp_path, ["un believ able Ham burg is a city of Ang ela Mer kel"], 60)
    task = tagged._task(tokenizer)
    sentences = [["Angela", "city", "is", "Hamburg"], ["a", "city"]]
    own = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"]]
    made = task.features(tagged._rows(sentences, own), tagged.LABELS, tagged._refuse)
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        rows = texts.lists(made.ragged[name])
        width = max(map(len, rows))
        batch[name] = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    lengths = torch.from_numpy(made.ragged["input_ids"][1])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    said = batch["labels"].clamp(min=0)
    first = (batch["labels"][0] >= 0).nonzero()[:, 0]
    said[0, first[1]] = tagged.LABELS.index("O")
    outputs = one_hot(said, len(tagged.LABELS)).float()
    found = task.shown(outputs, batch)
    assert [each.input for each in found] == ["Angela city is Hamburg", "a city"]
    assert found[0].expected == ["PER: Angela city", "LOC: Hamburg"]
    assert found[0].answer == ["PER: Angela", "LOC: Hamburg"]
    assert (found[0].is_right, found[0].score) == (False, 0.75)
    assert (found[1].expected, found[1].answer, found[1].is_right) == ([], [], True)
    loc, per = task.tables(task.measure(outputs, batch, task.loss(outputs, batch)))["entities"]
    assert loc == {"type": "LOC", "expected": 1, "found": 1, "right": 1, "precision": 1, "recall": 1, "f1": 1}
    assert per == {"type": "PER", "expected": 1, "found": 1, "right": 0, "precision": 0, "recall": 0, "f1": 0}


def test_questions_stand_over_the_context_of_their_answer(tmp_path):
    pairs = questions.PAIRS
    task = questions.make(questions.word_piece([part for pair in pairs for part in pair[:2]]))
    made = task.features(questions.rows_of(pairs), (), questions.refuse)
    found = [
        each
        for batch in questions.batches(made, tmp_path)[0]
        for each in task.shown(questions.perfect(batch), batch)
    ]
    assert len(found) == len(pairs)
    for each in found:
        asked, piece = each.input.split("\n", 1)
        context, answer = next((c, a) for _, c, a in pairs if piece.strip(shown.DOTS) in c)
        assert asked and each.expected == each.answer == answer and answer in piece
        assert (each.is_right, each.score, each.badness) == (True, 1, 0)
        assert piece.startswith(shown.DOTS) == (not context.strip().startswith(piece.strip(shown.DOTS)))


def test_no_answer(tmp_path):
    tokenizer = questions.word_piece(["who is there nobody"])
    task = questions.make(tokenizer, unanswerable=True)
    rows = questions.Rows(
        {
            "question": ["who is"],
            "context": ["nobody is there"],
            "answers": [{"text": [], "answer_start": []}],
        }
    )
    made = task.features(rows, (), questions.refuse)
    (batch,) = questions.batches(made, tmp_path)[0]
    (each,) = task.shown(questions.perfect(batch), batch)
    assert (each.expected, each.answer, each.is_right) == ("", "", True)
    assert each.input.endswith("\nnobody is there")


def test_translations_are_judged_one_by_one():
    tokenizer = translated.make_tokenizer()
    task = translated.make(tokenizer, for_eval=True, prefix="to ")
    batch = translated.batch_of(task.features(translated.ROWS, (), translated.refuse))
    generated = batch["labels"].masked_fill(batch["labels"] < 0, 0)
    generated[0, 1] = translated.WORDS.index("drei")
    found = task.shown(torch.zeros(1), batch, generated)
    assert found[0].input == "to one two"
    assert (found[0].expected, found[0].answer) == ("eins zwei", "eins drei")
    assert found[0].score == sacrebleu.sentence_chrf("eins drei", ["eins zwei"]).score < 100
    assert (found[1].score, found[1].is_right) == (100, None)
    assert found[0].badness > found[1].badness


@pytest.mark.parametrize("wants_exact", [True, False])
def test_talks(tokenizer, wants_exact):
    task = talks.exact(tokenizer) if wants_exact else talks.make(tokenizer)
    batch, _ = talks.batch_of(task)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    outputs = one_hot(batch["input_ids"].roll(-1, 1), len(tokenizer)).float() * 50
    outputs[0] /= 25
    silent = task.shown(outputs, batch, batch["input_ids"][:, :0] if wants_exact else None)
    assert silent[1].expected == "Hi, é!" and silent[1].input.endswith("assistant")
    assert silent[1].input.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there"
    )
    assert silent[0].score == pytest.approx(math.exp(2) / (math.exp(2) + len(tokenizer) - 1))
    assert silent[1].score == pytest.approx(1, abs=1e-6) and silent[0].badness > silent[1].badness
    if not wants_exact:
        assert [each.answer for each in silent] == [None] * 3
    ids = [tokenizer(text)["input_ids"] for text in ("Bye", "Hi, é!<|im_end|>", "Hi, é!")]
    width = max(map(len, ids))
    # What ended is padded with the token that ends texts; what was stopped is as long as all may be.
    ids[0] += tokenizer(" now" * width)["input_ids"]
    width = max(map(len, ids))
    generated = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in ids])
    found = task.shown(outputs, batch, generated)
    assert found[0].answer.startswith("Bye now") and found[0].answer.endswith(shown.DOTS)
    assert found[1].answer == found[2].answer == "Hi, é!"
    assert [e.is_right for e in found] == ([False, True, False] if wants_exact else [None] * 3)


def test_plain_text_is_continued_from_its_half(tokenizer, llama):
    task = talks.make(tokenizer)
    task.columns(["text"])
    made = task.features(talks.Rows({"text": ["Hello there Hello there Hello"]}), (), talks.refuse)
    (ids,) = talks.ids_of(made)
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    generated = task.generate(llama, batch, synced=False, limits={"max_new_tokens": 5, "max_time": 60.0})
    assert generated.shape[1] <= 5
    half = batch["input_ids"][:, : len(ids) // 2]
    alone = llama.generate(half, attention_mask=torch.ones_like(half), max_new_tokens=5, do_sample=False)
    assert generated[0].tolist() == alone[0, half.shape[1] :].tolist()
    with torch.no_grad():
        (each,) = task.shown(llama(batch["input_ids"]).logits, batch, generated)
    rest = tokenizer.decode(ids[len(ids) // 2 :], skip_special_tokens=True)
    assert (each.input, each.expected) == (tokenizer.decode(half[0]).strip(), rest.strip())


def test_texts_are_cut_where_they_tell_least():
    long = "".join(f"{i:03}" for i in range(400))
    assert shown.cut(long) == long[:399] + shown.DOTS and shown.cut("abc", 3) == "abc"
    assert shown.end_of(long, 10) == shown.DOTS + long[-9:] and shown.end_of("abc", 3) == "abc"
    piece = shown.piece(long, ["", "zzz", "199200201"], 21)
    assert piece == shown.DOTS + long[591:612] + shown.DOTS and piece[7:16] == "199200201"
    assert shown.piece(long, ["000"], 9) == "000001002" + shown.DOTS
    assert shown.piece(long, ["399"], 9) == shown.DOTS + "397398399"
    assert shown.piece("short", ["o"], 9) == shown.piece("short", ["none"], 9) == "short"


def test_what_is_written_is_short_and_json():
    each = shown.Shown("x" * 999, ["y" * 999] * 99, math.nan, None, 1 / 3).tree()
    assert len(each["input"]) == shown.LONGEST
    assert len(each["expected"]) == shown.MOST_WORDS + 1 and len(each["expected"][0]) == shown.LONGEST
    assert each["answer"] is None and each["score"] == 0.333333
    assert json.loads(json.dumps(each, allow_nan=False)) == each
