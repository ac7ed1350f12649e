"""What causal-lm learns from: checked with a tiny byte-level tokenizer and a tiny Llama."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from launcher import predict, recipe, tasks
from launcher.errors import DataError, ModelError, RecipeError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi, é!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": " Bye\nnow"},
]
UNSTABLE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last else m.content[:1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Rows:
    columns: dict[str, list[Any]]

    def where(self, i: int) -> str:
        return f"talk.jsonl, row {i + 1}"


def refuse(where, reason):
    raise DataError(f"{where}: {reason}")


def lists(ragged):
    values, lengths = ragged
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])] if len(lengths) else []


@pytest.fixture
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["Hello there assistant user system"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def make(tokenizer, max_length=512, **data):
    stage = recipe.Stage(name="s", task="causal-lm", data={"train": "x", **data})
    task = tasks.create(stage)
    task.set_tokenizer(tokenizer, max_length)
    return task


def ids_of(made):
    return lists(made.ragged["input_ids"])


def labels_of(made):
    masks = lists(made.ragged["target_mask"])
    pairs = zip(ids_of(made), masks, strict=True)
    return [[t if m else -100 for t, m in zip(ids, mask, strict=True)] for ids, mask in pairs]


def learned(tokenizer, made, i=0):
    kept = [t for t in labels_of(made)[i] if t != -100]
    return tokenizer.decode(kept, skip_special_tokens=False)


def test_chatml_loss_is_on_the_assistant_turns_and_their_end_marks(tokenizer):
    task = make(tokenizer)
    made = task.features(Rows({"messages": [TALK, TALK[:3]]}), (), refuse)
    assert made.num_skipped == 0 and made.num_cut == 0
    assert learned(tokenizer, made, 0) == "Hi, é!<|im_end|> Bye\nnow<|im_end|>"
    assert learned(tokenizer, made, 1) == "Hi, é!<|im_end|>"
    assert made.scalars["num_targets"][1] == sum(t != -100 for t in labels_of(made)[1])
    assert "<|im_start|>" in tokenizer.chat_template
    values, lengths = made.ragged["input_ids"]
    assert values.dtype == np.uint16 and lengths.dtype == np.int64
    assert made.ragged["target_mask"][0].dtype == np.uint8
    assert made.scalars["num_targets"].dtype == np.int32


def test_large_vocabularies_get_wider_ids(tokenizer):
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    made = make(tokenizer).features(Rows({"text": ["Hello<65535>"]}), (), refuse)
    assert made.ragged["input_ids"][0].dtype == np.int32
    assert tokenizer.decode(ids_of(made)[0]) == "Hello<65535></s>"


def test_plain_template_ends_turns_with_eos(tokenizer):
    made = make(tokenizer, chat_template="plain").features(Rows({"messages": [TALK]}), (), refuse)
    assert learned(tokenizer, made) == "Hi, é!</s> Bye\nnow</s>"
    assert ids_of(made)[0].count(tokenizer.bos_token_id) == 1


def test_turn_without_end_mark_keeps_its_newline(tokenizer, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    made = make(tokenizer, chat_template=str(file)).features(Rows({"messages": [TALK]}), (), refuse)
    assert learned(tokenizer, made).startswith("Hi, é!\n")


def test_assistant_may_speak_first(tokenizer):
    talk = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "x"}]
    made = make(tokenizer).features(Rows({"messages": [talk]}), (), refuse)
    assert learned(tokenizer, made) == "Welcome<|im_end|>"


def test_loss_on_all(tokenizer):
    made = make(tokenizer, loss_on="all").features(Rows({"messages": [TALK]}), (), refuse)
    assert labels_of(made) == ids_of(made)
    assert made.scalars["num_targets"].tolist() == [len(ids_of(made)[0]) - 1]


def test_instruction_rows(tokenizer):
    rows = Rows({"q": ["Add", "Say"], "output": ["3", "yes"], "input": ["1 2", None]})
    task = make(tokenizer, columns={"instruction": "q"})
    assert task.columns(list(rows.columns)) == ["q", "output", "input"]
    made = task.features(rows, (), refuse)
    assert "user\nAdd\n\n1 2<|im_end|>" in tokenizer.decode(ids_of(made)[0])
    assert learned(tokenizer, made, 1) == "yes<|im_end|>"


def test_rows_cut_before_the_answer_are_skipped(tokenizer):
    made = make(tokenizer, max_length=6).features(Rows({"messages": [TALK]}), (), refuse)
    assert (ids_of(made), made.num_skipped) == ([], 1)
    assert (made.num_cut, made.num_cut_tokens) == (0, 0)


def test_what_is_cut_is_counted(tokenizer):
    rows = Rows({"messages": [TALK, TALK[:3], TALK[1:3]]})
    whole = make(tokenizer).features(rows, (), refuse)
    lengths = whole.ragged["input_ids"][1].tolist()
    size = lengths[1]
    cut = make(tokenizer, max_length=size).features(rows, (), refuse)
    assert ids_of(cut) == [ids[:size] for ids in ids_of(whole)]
    assert labels_of(cut) == [labels[:size] for labels in labels_of(whole)]
    assert (cut.num_cut, cut.num_cut_tokens, cut.num_skipped) == (1, lengths[0] - size, 0)


def test_long_talks_may_go_on_in_further_samples(tokenizer):
    rows = Rows({"messages": [TALK, TALK[:3]]})
    whole = make(tokenizer).features(rows, (), refuse)
    task = make(tokenizer, max_length=20, split_long=True)
    made = task.features(rows, (), refuse)
    windows = [labels[i : i + 20] for labels in labels_of(whole) for i in range(0, len(labels), 20)]
    assert labels_of(made) == [w for w in windows if any(t != -100 for t in w[1:])]
    assert len(windows) > len(labels_of(made)) > 2
    assert (made.num_skipped, made.num_cut) == (0, 0)
    count = [sum(t != -100 for t in labels[1:]) for labels in labels_of(made)]
    assert made.scalars["num_targets"].tolist() == count


def test_what_a_row_and_a_target_are(tokenizer):
    for data, columns, expected in [
        ({}, ["messages"], True),
        ({"split_long": True}, ["messages"], False),
        ({}, ["text"], False),
        ({}, ["instruction", "output"], True),
    ]:
        task = make(tokenizer, **data)
        task.columns(columns)
        assert (task.one_sample_per_row, task.loss_unit) == (expected, "token")


@pytest.mark.parametrize("length", [3, 4, 5, 7, 100])
def test_plain_windows_lose_no_token(tokenizer, length):
    text = "Hello there, this is a text of some length"
    task = make(tokenizer, max_length=length)
    made = task.features(Rows({"text": [text, "", text]}), (), refuse)
    ids = [t for window in ids_of(made) for t in window]
    assert tokenizer.decode(ids) == (text + "</s>") * 2  # the empty text has nothing to predict
    assert made.num_skipped == 1 and max(map(len, ids_of(made))) <= length
    assert labels_of(made) == ids_of(made)


def test_no_rows_and_an_end_that_is_there(tokenizer):
    for name in ("text", "messages"):
        made = make(tokenizer).features(Rows({name: []}), (), refuse)
        assert set(made.ragged) == {"input_ids", "target_mask"}
        assert (ids_of(made), made.num_skipped, len(made.scalars["num_targets"])) == ([], 0, 0)
    made = make(tokenizer).features(Rows({"text": ["Hello</s>"]}), (), refuse)
    assert tokenizer.decode(ids_of(made)[0]) == "Hello</s>"


def test_mapped_column_decides_the_format(tokenizer):
    task = make(tokenizer, columns={"text": "body"})
    assert task.columns(["messages", "body"]) == ["body"]


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ({}, {"messages": [TALK, None]}, "talk.jsonl, row 2: messages must be"),
        ({}, {"messages": [[{"role": "user"}]]}, 'row 1: message 1 has no text under "content"'),
        ({}, {"messages": [[{"role": "user", "content": "\ud83d"}]]}, "message 1: its text under"),
        ({}, {"text": [None]}, 'row 1: column "text" is empty'),
        ({}, {"text": ["x", "x\ud83d"]}, 'row 2: column "text" is not Unicode text (half a surrogate'),
        ({}, {"txt": ["x"]}, "the files have: txt; map theirs"),
        ({"format": "text"}, {"txt": ["x"]}, 'no column "text" (did you mean "txt"?)'),
    ],
)
def test_unusable_rows(tokenizer, data, columns, said):
    with pytest.raises(DataError) as caught:
        make(tokenizer, **data).features(Rows(columns), (), refuse)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rows_rejected_are_left_out(tokenizer):
    said = []
    rows = Rows({"messages": [None, TALK, [], [{"role": "user", "content": 3}], TALK[:3], ["x"]]})
    made = make(tokenizer).features(rows, (), lambda where, reason: said.append(where))
    good = make(tokenizer).features(Rows({"messages": [TALK, TALK[:3]]}), (), refuse)
    assert said == [f"talk.jsonl, row {i}" for i in (1, 3, 4, 6)]
    assert labels_of(made) == labels_of(good) and made.num_skipped == 0
    said.clear()
    rows = Rows({"instruction": ["a", None, "c"], "output": ["x", None, 1], "input": ["", "\ud83d", None]})
    made = make(tokenizer).features(rows, (), lambda where, reason: said.append(where))
    assert said == ["talk.jsonl, row 2", "talk.jsonl, row 3"] and len(ids_of(made)) == 1
    said.clear()
    made = make(tokenizer).features(Rows({"text": [None, "Hello"]}), (), lambda *why: said.append(why))
    assert len(said) == 1 and tokenizer.decode(ids_of(made)[0]) == "Hello</s>"


def test_unstable_template(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(UNSTABLE)
    task = make(tokenizer, chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match="row 1: the chat template renders .*loss_on: all"):
        task.features(Rows({"messages": [TALK]}), (), refuse)
    with pytest.raises(DataError, match="chatml"):
        make(tokenizer, chat_template="chatm")


def batch_of(task):
    made = task.features(Rows({"messages": [TALK, TALK[:3], TALK[1:]]}), (), refuse)
    features = {"input_ids": (ids_of(made), 0), "labels": (labels_of(made), -100)}
    width = max(map(len, ids_of(made)))
    batch = {
        name: torch.tensor([v + [fill] * (width - len(v)) for v in values])
        for name, (values, fill) in features.items()
    }
    return batch, int(made.scalars["num_targets"].sum())


def test_loss_is_that_of_transformers(tokenizer, llama):
    task = make(tokenizer)
    batch, count = batch_of(task)
    reference = llama(**batch)
    loss = task.loss(reference.logits, batch)
    torch.testing.assert_close(loss, reference.loss * count)
    sums = task.measure(reference.logits, batch, loss)
    metrics = task.metrics(sums)
    assert sums.dtype == torch.float64 and sums[1] == count
    assert metrics["loss"] == pytest.approx(reference.loss.item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_sums_add_up_and_nothing_is_exactly_zero(tokenizer, llama):
    task = make(tokenizer)
    batch, _ = batch_of(task)
    logits = llama(batch["input_ids"]).logits
    whole = task.measure(logits, batch, task.loss(logits, batch))
    parts = []
    for i in range(3):
        one = {"labels": batch["labels"][i : i + 1]}
        parts.append(task.measure(logits[i : i + 1], one, task.loss(logits[i : i + 1], one)))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    none = {"labels": torch.full_like(batch["labels"], -100)}
    loss = task.loss(logits.bfloat16(), none)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in llama.parameters())
    assert not task.measure(logits, none, loss).any()


@pytest.mark.parametrize("layout", ["messages", "text"])
def test_predict_command(tokenizer, llama, tmp_path, capsys, layout):
    data = {"train": "x", "format": layout}
    described = recipe.parse(
        {"model": {"path": "m"}, "stages": [{"name": "s", "task": "causal-lm", "data": data}]}
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(described))
    (tmp_path / "lines").write_text("Hello there\n\nAnd now, something much longer?\n")
    arguments = [str(tmp_path), "--input", str(tmp_path / "lines")]
    assert predict.main(arguments) == 2
    assert "no exported model yet" in capsys.readouterr().err
    make(tokenizer, format=layout)
    export = tmp_path / "stages" / "s" / "export"
    llama.save_pretrained(export)
    tokenizer.save_pretrained(export)
    assert predict.main(arguments) == 0
    answers = capsys.readouterr().out.split("\n")[:-1]
    assert len(answers) == 3
    (tmp_path / "lines").write_text("Hello there\n")
    assert predict.main(arguments) == 0
    assert capsys.readouterr().out == answers[0] + "\n"
    assert predict.main([*arguments, "--stage", "t"]) == 2


def exact(tokenizer, **data):
    stage = recipe.Stage(
        name="s",
        task="causal-lm",
        data={"train": "x", **data},
        generation={"exact_match": True, "max_new_tokens": 12},
    )
    task = tasks.create(stage)
    task.columns(["messages"])
    task.set_tokenizer(tokenizer, 512)
    return task


def test_exact_match_is_of_the_last_answer(tokenizer, llama):
    task = exact(tokenizer)
    assert task.generates and not make(tokenizer).generates
    batch, _ = batch_of(task)
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < 1000).long().expand(3, -1)
    outputs = llama(batch["input_ids"]).logits
    loss = task.loss(outputs, batch)

    def said(*texts):
        ids = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, ids))
        return torch.tensor([row + [0] * (width - len(row)) for row in ids])

    generated = said(" Bye\nnow<|im_end|>rest", "Hi, é!", "Hi, é!<|im_end|>")
    sums = task.measure(outputs, batch, loss, generated)
    assert sums[3:].tolist() == [2, 3]
    assert task.metrics(sums)["exact_match"] == pytest.approx(2 / 3)
    assert task.answers(outputs, batch, generated)[2] == {"prediction": "Hi, é!", "reference": "Bye\nnow"}
    assert "exact_match" not in make(tokenizer).metrics(make(tokenizer).measure(outputs, batch, loss))
    batch["labels"].fill_(-100)
    assert not task.measure(outputs, batch, task.loss(outputs, batch), generated).any()


def test_answers_are_generated_from_all_before_the_last(tokenizer, llama):
    task = exact(tokenizer)
    batch, _ = batch_of(task)
    together = task.generate(llama, batch, synced=False)
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i, labels in enumerate(batch["labels"].tolist()):
        last = max(k for k, t in enumerate(labels) if t != -100)
        first = max(k for k in range(last) if labels[k] == -100) + 1
        prompt = batch["input_ids"][i : i + 1, :first]
        assert tokenizer.decode(prompt[0]).endswith("<|im_start|>assistant\n")
        alone = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            eos_token_id=[mark, tokenizer.eos_token_id], pad_token_id=tokenizer.eos_token_id,
        )[0, first:]  # fmt: skip
        assert together[i, : len(alone)].tolist() == alone.tolist()
    batch["labels"].fill_(-100)
    assert len(task.generate(llama, batch, synced=False)) == 3  # stand-ins: they need not be judged


def test_answers_without_generation_are_the_likeliest_tokens(tokenizer):
    task = make(tokenizer)
    batch, _ = batch_of(task)
    perfect = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), len(tokenizer)).float()
    answers = task.answers(perfect, batch)
    assert answers[1] == {"prediction": "Hi, é!", "reference": "Hi, é!"}
    assert all(answer["prediction"] == answer["reference"] for answer in answers)


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ({}, ["text"], "plain text"),
        ({"loss_on": "all"}, ["messages"], "loss_on is all"),
        ({"split_long": True}, ["messages"], "split_long"),
    ],
)
def test_exact_match_needs_a_last_answer(data, columns, said):
    generation = {"exact_match": True}
    stage = recipe.Stage(name="s", task="causal-lm", data={"train": "x", **data}, generation=generation)
    with pytest.raises(RecipeError, match=f"exact_match compares .*{said}"):
        tasks.create(stage).columns(columns)


def test_encoder_decoders_are_refused(tokenizer, llama):
    task = make(tokenizer)
    task.check_config(llama.config)
    with pytest.raises(ModelError, match="t5 is an encoder-decoder: .*task: translation"):
        task.check_config(T5Config())
