"""What causal-lm learns from: checked with a tiny byte-level tokenizer and a tiny Llama."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launcher import predict, recipe, tasks
from launcher.errors import DataError

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


def learned(tokenizer, features, i=0):
    kept = [t for t in features["labels"][i] if t != -100]
    return tokenizer.decode(kept, skip_special_tokens=False)


def test_chatml_loss_is_on_the_assistant_turns_and_their_end_marks(tokenizer):
    task = make(tokenizer)
    features, skipped = task.features(Rows({"messages": [TALK, TALK[:3]]}), ())
    assert skipped == 0
    assert learned(tokenizer, features, 0) == "Hi, é!<|im_end|> Bye\nnow<|im_end|>"
    assert learned(tokenizer, features, 1) == "Hi, é!<|im_end|>"
    assert features["num_targets"][1] == sum(t != -100 for t in features["labels"][1])
    assert "<|im_start|>" in tokenizer.chat_template


def test_plain_template_ends_turns_with_eos(tokenizer):
    features, _ = make(tokenizer, chat_template="plain").features(Rows({"messages": [TALK]}), ())
    assert learned(tokenizer, features) == "Hi, é!</s> Bye\nnow</s>"
    assert features["input_ids"][0].count(tokenizer.bos_token_id) == 1


def test_turn_without_end_mark_keeps_its_newline(tokenizer, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    features, _ = make(tokenizer, chat_template=str(file)).features(Rows({"messages": [TALK]}), ())
    assert learned(tokenizer, features).startswith("Hi, é!\n")


def test_assistant_may_speak_first(tokenizer):
    talk = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "x"}]
    features, _ = make(tokenizer).features(Rows({"messages": [talk]}), ())
    assert learned(tokenizer, features) == "Welcome<|im_end|>"


def test_loss_on_all(tokenizer):
    features, _ = make(tokenizer, loss_on="all").features(Rows({"messages": [TALK]}), ())
    assert features["labels"] == features["input_ids"]
    assert features["num_targets"] == [len(features["input_ids"][0]) - 1]


def test_instruction_rows(tokenizer):
    rows = Rows({"q": ["Add", "Say"], "output": ["3", "yes"], "input": ["1 2", None]})
    task = make(tokenizer, columns={"instruction": "q"})
    assert task.columns(list(rows.columns)) == ["q", "output", "input"]
    features, _ = task.features(rows, ())
    assert "user\nAdd\n\n1 2<|im_end|>" in tokenizer.decode(features["input_ids"][0])
    assert learned(tokenizer, features, 1) == "yes<|im_end|>"


def test_rows_cut_before_the_answer_are_skipped(tokenizer):
    features, skipped = make(tokenizer, max_length=6).features(Rows({"messages": [TALK]}), ())
    assert (features["input_ids"], skipped) == ([], 1)


@pytest.mark.parametrize("length", [3, 4, 5, 7, 100])
def test_plain_windows_lose_no_token(tokenizer, length):
    text = "Hello there, this is a text of some length"
    task = make(tokenizer, max_length=length)
    features, skipped = task.features(Rows({"text": [text]}), ())
    ids = [t for window in features["input_ids"] for t in window]
    assert tokenizer.decode(ids) == text + "</s>"
    assert skipped == 0 and max(map(len, features["input_ids"])) <= length
    assert features["labels"] == features["input_ids"]


def test_mapped_column_decides_the_format(tokenizer):
    task = make(tokenizer, columns={"text": "body"})
    assert task.columns(["messages", "body"]) == ["body"]


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ({}, {"messages": [TALK, None]}, "talk.jsonl, row 2: messages must be"),
        ({}, {"messages": [[{"role": "user"}]]}, 'row 1: message 1 has no text under "content"'),
        ({}, {"text": [None]}, 'row 1: column "text" is empty'),
        ({}, {"txt": ["x"]}, "the files have: txt; map theirs"),
        ({"format": "text"}, {"txt": ["x"]}, 'no column "text" (did you mean "txt"?)'),
    ],
)
def test_unusable_rows(tokenizer, data, columns, said):
    with pytest.raises(DataError) as caught:
        make(tokenizer, **data).features(Rows(columns), ())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unstable_template(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(UNSTABLE)
    task = make(tokenizer, chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match="row 1: the chat template renders .*loss_on: all"):
        task.features(Rows({"messages": [TALK]}), ())
    with pytest.raises(DataError, match="chatml"):
        make(tokenizer, chat_template="chatm")


def batch_of(task):
    features, _ = task.features(Rows({"messages": [TALK, TALK[:3], TALK[1:]]}), ())
    width = max(map(len, features["input_ids"]))
    pad = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([v + [fill] * (width - len(v)) for v in features[name]])
        for name, fill in pad.items()
    }
    return batch, sum(features["num_targets"])


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
