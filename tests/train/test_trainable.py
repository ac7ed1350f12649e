"""Which parameters are trained and how fast, and where adapters go: models in this process, no engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher import recipe as recipes
from launcher.errors import ModelError
from launcher.train import adapters, heads, trainable
from launcher.train import model as models
from launcher.train.parts import share_trunk
from tests.conftest import make_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def bert(num_labels: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, vocab_size=64, max_position_embeddings=32, num_labels=num_labels
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64)
    )


def llama() -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 1, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    )


def stage(task: str = "text-classification", **keys: Any) -> recipes.Stage:
    return recipes.Stage.model_validate(
        {"name": "target", "task": task, "data": {"train": "t.jsonl"}, "learning_rate": 1e-3} | keys
    )


def frozen(model: Any, asked: Any) -> set[str]:
    trainable.freeze(model, stage(trainable=asked))
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def names(model: Any, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def test_by_default_everything_is_trained() -> None:
    assert frozen(bert(), {}) == set()


def test_the_head_only() -> None:
    model = bert()
    # The pooler stands above the last layer: it goes with the head.
    assert frozen(model, "head") == names(model, "bert.embeddings.", "bert.encoder.")


def test_the_last_layers() -> None:
    model = bert()
    wanted = names(model, "bert.embeddings.", "bert.encoder.layer.0.")
    assert frozen(model, {"last_layers": 2}) == wanted
    assert frozen(bert(), {"last_layers": 3}) == names(model, "bert.embeddings.")


def test_patterns_are_searched_and_add_to_the_last_layers() -> None:
    model = bert()
    got = frozen(model, {"last_layers": 2, "freeze": [r"layer\.2\.", "pooler.*bias$"]})
    starts = ("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.2.", "bert.pooler.dense.bias")
    assert got == names(model, *starts)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"freeze": ["embedings"]}, 'trainable.freeze: "embedings" matches none of the'),
        ({"freeze": ["embeddings", "(unclosed"]}, 'trainable.freeze: "(unclosed" is no regular expression'),
        ({"freeze": [""]}, "trainable: nothing is left to train: freeze less"),
        ({"freeze": ["."]}, "trainable: nothing is left to train: freeze less"),
        ({"last_layers": 4}, "trainable.last_layers is 4, but the model has 3 layers"),
        ({"last_layers": 0, "freeze": ["classifier", "pooler"]}, "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused_in_a_line(asked: dict, part: str) -> None:
    with pytest.raises(ModelError) as error:
        frozen(bert(), asked)
    message = str(error.value)
    assert message.startswith("stages.target.trainable") and part in message and "\n" not in message


@pytest.mark.parametrize(
    ("build", "head", "depths"),
    [
        (
            bert,
            {"classifier.weight", "classifier.bias"},
            {
                "bert.embeddings.LayerNorm.weight": 0,
                "bert.encoder.layer.0.output.dense.weight": 1,
                "bert.encoder.layer.2.attention.self.query.bias": 3,
                "bert.pooler.dense.weight": 4,
                "classifier.bias": 4,
            },
        ),
        (
            gpt2,
            set(),  # Its output layer is tied to the embeddings.
            {
                "transformer.wte.weight": 0,
                "transformer.wpe.weight": 0,
                "transformer.h.0.ln_1.weight": 1,
                "transformer.h.1.mlp.c_fc.weight": 2,
                "transformer.ln_f.weight": 3,
            },
        ),
        (
            llama,
            {"lm_head.weight"},
            {
                "model.embed_tokens.weight": 0,
                "model.layers.0.mlp.up_proj.weight": 1,
                "model.layers.1.self_attn.q_proj.weight": 2,
                "model.norm.weight": 3,
                "lm_head.weight": 3,
            },
        ),
        (
            t5,
            set(),
            {
                "shared.weight": 0,
                "encoder.block.0.layer.1.DenseReluDense.wi.weight": 1,
                "decoder.block.0.layer.1.EncDecAttention.q.weight": 1,
                "decoder.block.1.layer.2.DenseReluDense.wo.weight": 2,
                "decoder.final_layer_norm.weight": 3,
            },
        ),
    ],
)
def test_where_parameters_are(build: Any, head: set[str], depths: dict[str, int]) -> None:
    model = build()
    located, num_layers = trainable.places(model)
    assert num_layers == (3 if build is bert else 2)
    assert {place.name for place in located if place.is_head} == head
    depth_of = {place.name: place.depth for place in located}
    assert {name: depth_of[name] for name in depths} == depths
    assert len(located) == len(list(model.parameters()))


def settings(model: Any, asked: recipes.Stage, extra: Any = None) -> dict[str, tuple[bool, float, int]]:
    """By parameter: whether it is decayed, its scale, the steps after which it moves."""
    named = {id(p): name for name, p in model.named_parameters()}
    if extra is not None:
        named |= {id(p): f"extra.{name}" for name, p in extra.named_parameters()}
    found: dict[str, tuple[bool, float, int]] = {}
    for group in trainable.groups(model, extra, asked):
        for parameter in group.parameters:
            name = named[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group.is_decayed, group.scale, group.opens_after)
    return found


def test_groups_hold_what_is_trained_once_and_spare_biases_and_norms_from_decay() -> None:
    model, asked = bert(), stage(trainable={"freeze": ["embeddings"]})
    trainable.freeze(model, asked)
    found = settings(model, asked)
    assert set(found) == {n for n, _ in model.named_parameters() if "embeddings" not in n}
    for name, (is_decayed, scale, opens_after) in found.items():
        assert is_decayed == (not name.endswith("bias") and "LayerNorm" not in name), name
        assert (scale, opens_after) == (1.0, 0)


def test_learning_rates_by_layer_and_of_the_head() -> None:
    model = bert()
    asked = stage(trainable={"layer_decay": 0.5}, head={"learning_rate": 5e-3})
    scales = {name: scale for name, (_, scale, _) in settings(model, asked, torch.nn.Linear(2, 2)).items()}
    wanted = {
        "bert.embeddings.": 0.5**4,
        "bert.encoder.layer.0.": 0.5**3,
        "bert.encoder.layer.1.": 0.5**2,
        "bert.encoder.layer.2.": 0.5,
        "bert.pooler.": 1.0,
        "classifier.": 5.0,
        "extra.": 5.0,
    }
    for name, scale in scales.items():
        assert scale == pytest.approx(next(v for k, v in wanted.items() if name.startswith(k))), name
    # Without a rate of its own, the head has the stage's, whatever the decay.
    assert settings(model, stage(trainable={"layer_decay": 0.5}))["classifier.weight"][1] == 1.0


def test_when_layers_begin_to_move() -> None:
    model = bert()
    found = settings(model, stage(trainable={"unfreeze_every": 10}))
    wanted = {
        "classifier.weight": 0,
        "bert.pooler.dense.weight": 0,
        "bert.encoder.layer.2.output.dense.weight": 10,
        "bert.encoder.layer.1.output.dense.bias": 20,
        "bert.encoder.layer.0.output.dense.weight": 30,
        "bert.embeddings.word_embeddings.weight": 40,
    }
    assert {name: found[name][2] for name in wanted} == wanted


def test_merged_groups_hold_shared_parameters_once_with_the_last_settings() -> None:
    first, main = bert(2), bert(3)
    share_trunk([first, main])
    slow, plain = stage(trainable={"layer_decay": 0.5}), stage(head={"learning_rate": 4e-3})
    asked = [*trainable.groups(first, None, slow), *trainable.groups(main, None, plain)]
    merged = trainable.merged(asked)
    held = [id(p) for group in merged for p in group.parameters]
    own = {id(p) for model in (first, main) for p in model.parameters()}
    assert len(held) == len(set(held)) and set(held) == own
    scale_of = {id(p): group.scale for group in merged for p in group.parameters}
    assert {scale_of[id(p)] for p in main.bert.parameters()} == {1.0}
    assert {scale_of[id(p)] for p in main.classifier.parameters()} == {4.0}
    assert {scale_of[id(p)] for p in first.classifier.parameters()} == {1.0}
    assert [group.is_decayed for group in merged] == sorted((g.is_decayed for g in merged), reverse=True)


def test_a_trunk_of_another_kind_cannot_be_shared() -> None:
    with pytest.raises(ModelError, match="joint needs one trunk"):
        share_trunk([bert(), llama()])


def test_a_pooler_of_one_model_serves_all() -> None:
    config = bert().config
    tagger = transformers.BertForTokenClassification(config)
    other = bert()
    share_trunk([tagger, other])
    assert tagger.bert is other.bert and tagger.bert.pooler is not None


# Adapters


@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_adapters_begin_as_no_change(build: Any) -> None:
    model = build().eval()
    ids = torch.arange(20).reshape(2, 10)
    before = model(input_ids=ids).logits
    task = "text-classification" if build is bert else "causal-lm"
    adapters.add(model, stage(task, trainable={"lora": {"rank": 4, "dropout": 0.1}}))
    assert adapters.is_adapted(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".lora_" not in n} == (
        names(model, "classifier.") if build is bert else set()
    )
    assert any(".lora_B." in n for n in trained)


def test_a_frozen_head_stays_frozen_beside_adapters() -> None:
    model, asked = bert(), stage(trainable={"lora": {}, "freeze": ["classifier"]})
    trainable.freeze(model, asked)
    adapters.add(model, asked)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }


def test_adapters_are_drawn_from_the_seed() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = bert()
        torch.manual_seed(torch.seed())
        adapters.add(model, stage(trainable={"lora": {}}, seed=seed))
        drawn.append(torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_A." in n]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_only_the_modules_asked_for_are_adapted() -> None:
    model = bert()
    adapters.add(model, stage(trainable={"lora": {"modules": ["key"]}}))
    adapted = {n for n, _ in model.named_parameters() if ".lora_A." in n}
    assert len(adapted) == 3 and all(".attention.self.key." in n for n in adapted)


def test_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError) as error:
        adapters.add(bert(), stage(trainable={"lora": {"modules": ["q_proj"]}}))
    message = str(error.value)
    assert "stages.target.trainable.lora" in message and "q_proj" in message and "\n" not in message


# Labels of a head


def test_labels_are_read_by_their_numbers(tmp_path: Path) -> None:
    words = [f"label {i}" for i in range(12)]  # "10" sorts before "2" as text.
    config = transformers.BertConfig(id2label=dict(enumerate(words)))
    config.save_pretrained(tmp_path)
    assert heads.labels_of(str(tmp_path)) == words
    heads.check_labels(str(tmp_path), {"id2label": dict(enumerate(words))}, "target")
    with pytest.raises(ModelError, match="head: keep"):
        heads.check_labels(str(tmp_path), {"id2label": dict(enumerate(words[::-1]))}, "target")


# More tokens


def test_growing_keeps_old_rows_and_draws_new_ones_from_the_seed(tmp_path: Path) -> None:
    origin = bert()
    origin.save_pretrained(tmp_path / "origin")
    rows = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        asked = recipes.Model(path=str(tmp_path / "origin"), add_tokens=["x"], init_seed=seed)
        torch.manual_seed(torch.seed())
        models.grow(asked, "AutoModelForSequenceClassification", tmp_path / name, 70)
        grown = transformers.BertForSequenceClassification.from_pretrained(tmp_path / name)
        assert grown.config.vocab_size == 70
        rows.append(grown.bert.embeddings.word_embeddings.weight.detach())
        assert torch.equal(rows[-1][:64], origin.bert.embeddings.word_embeddings.weight)
        assert torch.equal(grown.classifier.weight, origin.classifier.weight)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_growing_draws_a_missing_pooler_from_the_seed(tmp_path: Path) -> None:
    transformers.BertForTokenClassification(bert().config).save_pretrained(tmp_path / "origin")
    poolers = []
    for name in ("a", "b"):
        asked = recipes.Model(path=str(tmp_path / "origin"), add_tokens=["x"])
        torch.manual_seed(torch.seed())
        models.grow(asked, "AutoModelForSequenceClassification", tmp_path / name, 65)
        grown = transformers.BertForSequenceClassification.from_pretrained(tmp_path / name)
        poolers.append(grown.bert.pooler.dense.weight)
    assert torch.equal(*poolers)


def test_growing_never_shrinks(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "origin")
    asked = recipes.Model(path=str(tmp_path / "origin"), add_tokens=["x"])
    models.grow(asked, "AutoModelForSequenceClassification", tmp_path / "grown", 50)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "grown").vocab_size == 64


def test_added_tokens_are_one_token_each(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer", ["some words to learn"], 300)
    plain = models.load_tokenizer(recipes.Model(path=str(folder)))
    grown = models.load_tokenizer(recipes.Model(path=str(folder), add_tokens=["zebrafish"]))
    assert len(grown) == len(plain) + 1
    assert len(plain.encode("zebrafish", add_special_tokens=False)) > 1
    assert grown.encode("zebrafish", add_special_tokens=False) == [len(plain)]
