"""What translation learns from: checked with a tiny word tokenizer, a tiny T5, Marian and mBART."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BertConfig,
    LlamaConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from launcher import recipe, tasks
from launcher.errors import DataError, ModelError
from launcher.recipes import train_tokenizer
from launcher.tasks.translation import check_model
from tests.tasks.texts import Rows, lists, refuse

WORDS = ["<pad>", "</s>", "<unk>", "to", "one", "two", "three", "four", "five", "six"]
WORDS += ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
ROWS = Rows(
    {"source": ["one two", "three", "six five four"], "target": ["eins zwei", "drei", "sechs fünf vier"]}
)


def make_tokenizer(ends=True):
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make(tokenizer=None, max_length=16, generation=None, for_eval=False, **data):
    stage = recipe.Stage(
        name="s",
        task="translation",
        data={"train": "x", **data},
        max_length=max_length,
        generation={"max_new_tokens": 8, **(generation or {})},
    )
    task = tasks.create(stage)
    task.for_eval = for_eval
    if tokenizer is not None:
        task.set_tokenizer(tokenizer, max_length)
    return task


def t5(**settings):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        **{"decoder_start_token_id": 0, **settings},
    )
    return T5ForConditionalGeneration(config).eval()


def bart_like(config_class, model_class, **settings):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
        init_std=0.5,
        **settings,
    )
    return model_class(config).eval()


MODELS = {
    # An untrained T5 repeats what it starts with: let that be a word.
    "t5": lambda: t5(decoder_start_token_id=3),
    "marian": lambda: bart_like(MarianConfig, MarianMTModel),
    "mbart": lambda: bart_like(MBartConfig, MBartForConditionalGeneration),
    "m2m_100": lambda: bart_like(M2M100Config, M2M100ForConditionalGeneration),
}


def batch_of(made, rows=None, extra=0):
    """The batch that the feed makes of samples, padded by `extra` more."""
    rows = list(range(len(made.scalars["num_targets"]))) if rows is None else rows
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("_reference", 0)):
        if name not in made.ragged:
            continue
        sequences = lists(made.ragged[name])
        chosen = [sequences[i] for i in rows]
        width = max(map(len, chosen)) + extra
        batch[name] = torch.tensor([ids + [fill] * (width - len(ids)) for ids in chosen])
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


def test_features(tokenizer):
    task = make(tokenizer, prefix="to ")
    assert task.columns(["target", "id", "source"]) == ["source", "target"]
    made = task.features(ROWS, (), refuse)
    assert lists(made.ragged["input_ids"]) == [[3, 4, 5, 1], [3, 6, 1], [3, 9, 8, 7, 1]]
    assert lists(made.ragged["labels"]) == [[10, 11, 1], [12, 1], [15, 14, 13, 1]]
    assert made.scalars["num_targets"].tolist() == [3, 2, 4]
    assert set(made.ragged) == {"input_ids", "labels"}  # no types, though the tokenizer would make some
    assert made.ragged["input_ids"][0].dtype == np.uint16 and made.ragged["labels"][0].dtype == np.int32
    assert made.scalars["num_targets"].dtype == np.int32
    assert (made.num_skipped, made.num_cut, made.num_cut_tokens) == (0, 0, 0)
    assert task.one_sample_per_row and task.loss_unit == "token" and task.generates
    none = task.features(Rows({"source": [], "target": []}), (), refuse)
    assert set(none.ragged) == {"input_ids", "labels"} and not len(none.scalars["num_targets"])


def test_evaluation_has_the_references_as_they_were_written(tokenizer):
    rows = Rows({"source": ["one", "two"], "target": [" Eins,  zwei, “é”\n", "x"]})
    task = make(tokenizer, for_eval=True)
    made = task.features(rows, (), refuse)
    assert task.has_eval_features and made.ragged["_reference"][0].dtype == np.uint8
    batch = batch_of(made)
    answers = task.answers(None, batch, torch.tensor([[0, 10, 11, 1, 0], [0, 12, 1, 0, 0]]))
    assert answers == [
        {"prediction": "eins zwei", "reference": rows.columns["target"][0]},
        {"prediction": "drei", "reference": "x"},
    ]


@pytest.mark.parametrize("ends", [True, False])
def test_both_sides_are_cut_and_keep_their_end(ends):
    rows = Rows(
        {"source": ["one two three four", "one", "one"], "target": ["eins", "eins zwei drei vier", "eins"]}
    )
    made = make(make_tokenizer(ends), max_length=3).features(rows, (), refuse)
    assert lists(made.ragged["input_ids"]) == ([[4, 5, 1], [4, 1], [4, 1]] if ends else [[4, 5, 6], [4], [4]])
    assert lists(made.ragged["labels"]) == [[10, 1], [10, 11, 1], [10, 1]]
    assert made.scalars["num_targets"].tolist() == [2, 3, 2]
    assert (made.num_skipped, made.num_cut, made.num_cut_tokens) == (0, 2, 4 if ends else 3)


def test_rows_with_nothing_left_are_skipped(tokenizer):
    rows = Rows({"source": ["one", "two", "three"], "target": ["eins", "zwei zwei", "drei"]})
    made = make(tokenizer, max_length=1, for_eval=True).features(rows, (), refuse)
    assert made.num_skipped == 3 and all(not len(v) for v, _ in made.ragged.values())
    assert (made.num_cut, made.num_cut_tokens) == (0, 0)
    vanishing = make_tokenizer()
    # Control characters are no words for it: nothing is left of such a target.
    from tokenizers import normalizers

    vanishing.backend_tokenizer.normalizer = normalizers.Replace("zwei", "")
    rows = Rows({"source": ["one", "two"], "target": ["eins", "zwei"]})
    made = make(vanishing, for_eval=True).features(rows, (), refuse)
    assert made.num_skipped == 1 and lists(made.ragged["labels"]) == [[10, 1]]
    assert len(made.ragged["_reference"][1]) == 1


class TwoSided(PreTrainedTokenizerFast):
    """As mBART and NLLB do it: the target side has another post-processor."""

    def _switch_to_target_mode(self):
        pair = [("</s>", 1), ("to", 3)]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="to $A </s>", special_tokens=pair
        )

    def _switch_to_input_mode(self):
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )


def test_the_target_side_of_the_tokenizer_is_used_and_left_again(tokenizer):
    two_sided = TwoSided(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made = make(two_sided).features(ROWS, (), refuse)
    assert lists(made.ragged["labels"])[:2] == [[3, 10, 11, 1], [3, 12, 1]]
    assert lists(made.ragged["input_ids"])[:2] == [[4, 5, 1], [6, 1]]
    assert lists(make(two_sided).features(ROWS, (), refuse).ragged["input_ids"])[:1] == [[4, 5, 1]]


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ({}, {"source": ["a", None], "target": ["b", "b"]}, 'row 2: column "source" is empty (null)'),
        ({}, {"source": ["a"], "target": [["b"]]}, 'row 1: column "target" is a list, not text'),
        ({}, {"source": ["a", "a"], "target": ["b", ""]}, 'row 2: column "target" is an empty text: fill'),
        ({}, {"source": ["\n "], "target": ["b"]}, 'row 1: column "source" is an empty text'),
        (
            {"columns": {"source": "en"}},
            {"eng": ["a"], "target": ["b"]},
            'no column "en" (did you mean "eng"?)',
        ),
    ],
)
def test_unusable_rows(tokenizer, data, columns, said):
    with pytest.raises(DataError) as caught:
        make(tokenizer, **data).features(Rows(columns), (), refuse)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rows_rejected_are_left_out_and_told_once(tokenizer):
    said = []
    columns = {"source": ["one", None, "", "two", "six"], "target": ["eins", None, "x", "\ud83d", "sechs"]}
    made = make(tokenizer, for_eval=True).features(Rows(columns), (), lambda where, why: said.append(where))
    assert sorted(said) == [f"a.jsonl, row {i}" for i in (2, 3, 4)]
    assert lists(made.ragged["labels"]) == [[10, 1], [15, 1]] and made.num_skipped == 0
    assert len(made.ragged["_reference"][1]) == 2


def test_misspelt_mapping_and_a_tokenizer_without_an_end(tokenizer):
    with pytest.raises(DataError, match='no column "sorce" .did you mean "source"'):
        make(columns={"sorce": "en"}).columns(["en", "target"])
    endless = make_tokenizer(ends=False)
    endless.eos_token = None
    with pytest.raises(ModelError, match="no eos_token"):
        make(endless)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_transformers(tokenizer, name):
    task, model = make(tokenizer, for_eval=True), MODELS[name]()
    made = task.features(ROWS, (), refuse)
    batch = batch_of(made)
    count = int(made.scalars["num_targets"].sum())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    reference = model(**inputs)
    outputs = task.outputs(model, None, batch)
    torch.testing.assert_close(outputs, reference.logits)
    loss = task.loss(outputs, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference.loss * count)
    metrics = task.metrics(task.measure(outputs, batch, loss))
    assert metrics["loss"] == pytest.approx(reference.loss.item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert math.isnan(metrics["bleu"])  # nothing was generated


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_change_nothing(tokenizer, name):
    task, model = make(tokenizer, for_eval=True), MODELS[name]()
    made = task.features(ROWS, (), refuse)
    batch, wider = batch_of(made), batch_of(made, extra=5)
    whole = task.loss(task.outputs(model, None, batch), batch)
    torch.testing.assert_close(task.loss(task.outputs(model, None, wider), wider), whole)
    alone = [batch_of(made, [i]) for i in range(3)]
    parts = [task.loss(task.outputs(model, None, one), one) for one in alone]
    torch.testing.assert_close(sum(parts), whole)
    together = task.generate(model, wider, synced=False)
    texts = [answer["prediction"] for answer in task.answers(None, wider, together)]
    said = [task.answers(None, one, task.generate(model, one, synced=False))[0] for one in alone]
    assert texts == [one["prediction"] for one in said] and any(texts)
    assert torch.equal(together, task.generate(model, wider, synced=False))
    assert together.shape[1] <= 1 + 8


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_the_recipe(tokenizer, beams):
    task, model = make(tokenizer, generation={"beams": beams, "max_new_tokens": 4}), t5()
    model.config.use_cache = False  # as in training
    batch = batch_of(task.features(ROWS, (), refuse))
    expected = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, max_new_tokens=4
    )
    assert torch.equal(task.generate(model, batch, synced=False), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_stand_in_adds_exactly_nothing(tokenizer, name):
    task, model = make(tokenizer, generation={"rouge": True}, for_eval=True), MODELS[name]()
    batch = batch_of(task.features(ROWS, (), refuse), [1])
    batch["labels"].fill_(-100)
    outputs = task.outputs(model, None, batch)
    loss = task.loss(outputs.bfloat16(), batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0.0
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    assert with_gradient and not any(p.grad.any() for p in with_gradient)
    generated = task.generate(model, batch, synced=False)
    assert not task.measure(outputs, batch, loss, generated).any()
    assert all(math.isnan(value) for value in task.metrics(task.measure(outputs, batch, loss)).values())


def test_sums_of_parts_are_those_of_the_whole(tokenizer):
    task, model = make(tokenizer, generation={"rouge": True}, for_eval=True), t5()
    draw = random.Random(0)
    targets = [" ".join(draw.choices(WORDS[10:], k=draw.randint(4, 7))) for _ in range(9)]
    rows = Rows({"source": ["one two three"] * 9, "target": targets})
    made = task.features(rows, (), refuse)
    # Answers that are partly right.
    rough = [" ".join(w if draw.random() < 0.8 else "eins" for w in t.split()) for t in targets]
    ids = [[0, *tokenizer(text)["input_ids"]] for text in rough]
    generated = torch.tensor([row + [0] * (9 - len(row)) for row in ids])

    def sums(part):
        batch = batch_of(made, part)
        outputs = task.outputs(model, None, batch)
        return task.measure(outputs, batch, task.loss(outputs, batch), generated[part])

    whole = sums(list(range(9)))
    added = sums([8, 2]) + sums([0, 1, 3, 4]) + sums([5]) + sums([6, 7])
    assert torch.equal(whole[1:-3], added[1:-3])
    torch.testing.assert_close(added, whole, rtol=1e-6, atol=1e-6)
    metrics = task.metrics(added)
    assert metrics["bleu"] == sacrebleu.corpus_bleu(rough, [targets]).score
    assert metrics["chrf"] == sacrebleu.corpus_chrf(rough, [targets]).score
    assert 20 < metrics["bleu"] < 99 and 0 < metrics["rouge2"] < metrics["rouge1"] < 1
    assert list(metrics) == [
        *("bleu", "chrf", "loss", "perplexity", "token_accuracy"),
        *("rouge1", "rouge2", "rougeL"),
    ]
    assert task.signature() == task.notes()["bleu"] and "tok:13a" in task.signature()


def test_a_toy_language_is_learned(tokenizer):
    """One numeral after another: the decoder has to find its place in what the encoder read."""
    task = make(tokenizer, for_eval=True)
    draw = random.Random(0)
    numbers = [[draw.randrange(6) for _ in range(draw.randint(4, 5))] for _ in range(1000)]
    rows = Rows(
        {
            "source": [" ".join(WORDS[4 + n] for n in row) for row in numbers],
            "target": [" ".join(WORDS[10 + n] for n in row) for row in numbers],
        }
    )
    made, model = task.features(rows, (), refuse), t5()
    everything, held_out = batch_of(made, list(range(32, 1000))), batch_of(made, list(range(32)))

    def metrics():
        model.eval()
        with torch.no_grad():
            outputs = task.outputs(model, None, held_out)
            generated = task.generate(model, held_out, synced=False)
            loss = task.loss(outputs, held_out)
            return task.metrics(task.measure(outputs, held_out, loss, generated))

    before = metrics()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        model.train()
        own = [(step * 48 + i) % 968 for i in range(48)]
        batch = {name: values[own] for name, values in everything.items()}
        loss = task.loss(task.outputs(model, None, batch), batch) / int((batch["labels"] != -100).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = metrics()
    assert before["bleu"] < 10 and after["bleu"] > 60
    assert after["chrf"] > before["chrf"] and after["loss"] < before["loss"] / 4
    lines = ["one two three four", "", "six one five two"]
    learned = task.predict(model, None, tokenizer, lines)
    expected = ["eins zwei drei vier", "", "sechs eins fünf zwei"]
    assert learned[1] == "" and sum(a == b for a, b in zip(learned, expected, strict=True)) >= 2


def test_predict_reads_as_training_did(tokenizer):
    task, model = make(tokenizer, max_length=4, prefix="to "), t5()
    lines = ["six five four three two one", "one", "", "two one"]
    answers = task.predict(model, None, tokenizer, lines)
    assert answers == [task.predict(model, None, tokenizer, [line])[0] for line in lines]
    assert answers[0] == task.predict(model, None, tokenizer, ["six five"])[0]  # the rest is cut
    inputs = tokenizer("to one", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answers[1] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert task.predict(model, None, tokenizer, ["", " "]) == ["", ""]


def test_models_that_cannot_translate_are_refused(tokenizer):
    task = make(tokenizer)
    for config, said in [
        (LlamaConfig(), "llama is a decoder only"),
        (BertConfig(), "bert is an encoder only"),
        (T5Config(), "decoder_start_token_id is not set, and translation needs it: set it, for T5 to pad"),
        (
            MarianConfig(vocab_size=100, pad_token_id=0),
            "decoder_start_token_id is 58100, but vocab_size is 100",
        ),
        (T5Config(decoder_start_token_id=0, pad_token_id=None), "pad_token_id is not set"),
        (T5Config(decoder_start_token_id=0, eos_token_id=7), "eos_token_id is 7, but the tokenizer ends"),
    ]:
        with pytest.raises(ModelError) as caught:
            task.check_config(config)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    for config in (
        T5Config(decoder_start_token_id=0),
        MBartConfig(eos_token_id=1),
        BartConfig(eos_token_id=1),
    ):
        task.check_config(config)
        check_model(config)


def test_a_model_that_cannot_begin_says_so_in_the_forward(tokenizer):
    task = make(tokenizer)
    batch = batch_of(task.features(ROWS, (), refuse))
    for model in (t5(decoder_start_token_id=None), MODELS["m2m_100"]()):
        model.config.decoder_start_token_id = None
        with pytest.raises(ModelError, match="model.config.decoder_start_token_id is not set"):
            task.outputs(model, None, batch)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_trained_tokenizer(tmp_path, kind, capsys):
    draw = random.Random(0)
    words = {
        "en": "the house number small red tree runs".split(),
        "de": "das Haus Nummer klein rot Baum".split(),
    }
    rows = [{name: " ".join(draw.choices(own, k=6)) + "." for name, own in words.items()} for _ in range(500)]
    file = tmp_path / "t.csv"
    file.write_text("en,de\n" + "".join(f"{row['en']},{row['de']}\n" for row in rows))
    out = tmp_path / "tokenizer"
    arguments = ["--column", "en", "--column", "de", "--kind", kind, "--out", str(out)]
    assert train_tokenizer.main([*arguments, "--vocabulary", "350", str(file)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.is_fast and len(tokenizer) <= 350
    specials = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert specials == (0, 1, 2)
    for text in ["the house", "Das Haus ist klein, ñ 日本 🙂!", "two  spaces\nand a line", "", "klein ."]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1 and ids.count(1) == 1 and 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("das Haus Nummer")["input_ids"]) < 8  # words, not letters
    task = make(tokenizer, for_eval=True, columns={"source": "en", "target": "de"})
    made = task.features(Rows({name: [row[name] for row in rows] for name in ("en", "de")}), (), refuse)
    assert tokenizer.batch_decode(lists(made.ragged["labels"]), skip_special_tokens=True)[7] == rows[7]["de"]
    capsys.readouterr()
    for wrong, said in [
        (["--vocabulary", "200", str(file)], "at least 260"),
        (["--column", "fr", str(file)], "--column fr: the files have no such column; they have: en, de"),
        ([str(tmp_path / "absent.csv")], "absent.csv"),
    ]:
        assert train_tokenizer.main([*arguments, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_command_of_the_documentation_runs(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"source": "a house", "target": "ein Haus"}\n' * 50)
    command = [sys.executable, train_tokenizer.__file__, "--column", "source", "--column", "target"]
    command += ["--vocabulary", "300", "--out", "made", "t.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "tokenizer.json").is_file()
