"""Transfer through real DeepSpeed engines on two ranks: joint gradients, what moves, heads, adapters, exports."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.data.feed import StepBatch
from launcher.errors import LauncherError, ModelError
from tests.conftest import make_tokenizer, sentence, write_jsonl
from tests.train import transfer_ranks as ranks

pytestmark = pytest.mark.slow

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LR, WEIGHTS = 1e-3, (0.5, 2.0)
JOINT = (0, 1, 2, 3, "3_multinode")
ADDED = ["<entity>", "zebrafish"]
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
POOLER = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
ADAPTED = {"lora": {"rank": 4, "alpha": 16, "export": "adapter"}}


class World:
    """The files of the cases, and the recipes on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, draw = folder, random.Random(5)
        texts = [sentence(draw, draw.randint(2, 9)) for _ in range(40)]
        self.tokenizer = str(make_tokenizer(folder / "tokenizer", texts, 320))
        self.trunk = str(folder / "trunk")
        torch.manual_seed(7)
        config = transformers.BertConfig(
            **{k: v for k, v in BERT.items() if k != "model_type"}, vocab_size=320
        )
        # What a token-classification model leaves has no pooler.
        transformers.BertForTokenClassification(config).save_pretrained(self.trunk)
        self.texts = texts

    def data(self, labels: list[str]) -> dict[str, Any]:
        rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(self.texts)]
        path = write_jsonl(self.folder / f"{''.join(labels)}.jsonl", rows)
        return {"train": str(path), "labels": labels}

    def stage(self, labels: list[str], **keys: Any) -> dict[str, Any]:
        settings = {
            "name": "target",
            "task": "text-classification",
            "data": self.data(labels),
            "steps": 3,
            "global_batch": 8,
            "micro_batch": 2,
            "learning_rate": LR,
            "schedule": "constant",
            "max_length": 32,
        }
        return settings | keys

    def recipe(self, *stages: dict[str, Any], **keys: Any) -> dict[str, Any]:
        model = {"config": BERT, "tokenizer": self.tokenizer, "dtype": "fp32"} | keys.pop("model", {})
        return {"model": model, "stages": list(stages), **keys}

    def case(
        self, name: str, what: str, stage: int | str, *stages: dict[str, Any], **keys: Any
    ) -> ranks.Case:
        return ranks.case(name, what, stage, self.recipe(*stages, **keys), self.folder)

    def cases(self) -> list[ranks.Case]:
        return [
            *self.of_joint(),
            *self.of_moved(),
            *self.of_moved_jointly(),
            *self.of_heads(),
            *self.of_models(),
        ]

    def of_joint(self) -> list[ranks.Case]:
        # Three rounds of the second, one of the first: two fillers on each rank.
        first = self.stage(["bad", "good"], name="first", weight=WEIGHTS[0], global_batch=6, micro_batch=3)
        second = self.stage(["A", "B", "C"], weight=WEIGHTS[1], global_batch=10)
        return [self.case(f"joint-{n}", "joint", n, first, second, transfer="joint") for n in JOINT]

    def of_moved(self) -> list[ranks.Case]:
        labels = ["A", "B", "C"]
        wanted = [
            ("frozen", range(4), {"trainable": {"freeze": ["embeddings", r"layer\.0\."]}}),
            ("last", (0, 1, 2), {"trainable": {"last_layers": 1}}),
            ("head", range(3), {"trainable": "head"}),
            ("gradual", (0, 2, 3), {"trainable": {"unfreeze_every": 2}, "steps": 8}),
            (
                "decay",
                range(4),
                {"trainable": {"layer_decay": 0.5}, "head": {"learning_rate": 4 * LR}, "steps": 1},
            ),
            ("lora", (2, 3), {"trainable": ADAPTED}),
        ]
        return [
            self.case(f"{name}-{n}", "exported" if name == "lora" else "moved", n, self.stage(labels, **keys))
            for name, stages, keys in wanted
            for n in stages
        ]

    def of_moved_jointly(self) -> list[ranks.Case]:
        first = self.stage(["bad", "good"], name="first")
        frozen = {"freeze": ["embeddings", r"layer\.0\."]}
        return [
            self.case(
                f"jointly-{name}-{n}",
                "moved",
                n,
                first,
                self.stage(["A", "B", "C"], trainable=trainable),
                transfer="joint",
            )
            for name, n, trainable in (("frozen", 0, frozen), ("frozen", 3, frozen), ("lora", 2, ADAPTED))
        ]

    def of_heads(self) -> list[ranks.Case]:
        first = self.stage(["A", "B", "C"], name="first", steps=1)
        cases = [self.case("first", "exported", 2, first)]
        for name, stage, labels, start in (
            ("match-0", 0, ["C", "X", "A"], "match"),
            ("match-3", 3, ["C", "X", "A"], "match"),
            ("keep", 3, ["A", "B", "C"], "keep"),
            ("keep-other", 3, ["C", "B", "A"], "keep"),
            ("match-none", 3, ["Aa", "P"], "match"),
        ):
            made = self.case(name, "loaded", stage, first, self.stage(labels, head=start))
            cases.append(replace(made, run_dir=cases[0].run_dir))
        return cases

    def of_models(self) -> list[ranks.Case]:
        labels, given = ["A", "B", "C"], {"config": None, "path": self.trunk}
        of_adapter = self.stage(labels, trainable=ADAPTED)
        wrong = {"lora": {"modules": ["q_proj"]}}
        spoken = {
            "name": "chat",
            "task": "causal-lm",
            "data": {"train": str(self.folder / "ABC.jsonl"), "format": "text"},
            "max_length": 32,
            "trainable": {"lora": {"rank": 4, "export": "adapter"}},
        }
        return [
            self.case("trunk-0", "loaded", 0, self.stage(labels), model=given),
            self.case("trunk-3", "loaded", 3, self.stage(labels), model=given),
            self.case("trunk-lora", "exported", 2, of_adapter, model=given),
            self.case(
                "grown", "exported", 3, self.stage(labels, steps=1), model=given | {"add_tokens": ADDED}
            ),
            self.case("wrong-modules", "loaded", 3, self.stage(labels, trainable=wrong)),
            self.case("llama", "language", 0, spoken, model={"config": LLAMA}),
            self.case("gpt2", "language", 0, spoken, model={"config": GPT2}),
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("transfer"))


@pytest.fixture(scope="module")
def both(world: World) -> list[dict[str, Any]]:
    """What the two ranks found."""
    return ranks.run(world.cases(), world.folder)


@pytest.fixture(scope="module")
def found(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def parameters_that_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


# Joint training


def reference(world: World, before: dict[str, torch.Tensor]) -> tuple[list[dict], list[float]]:
    """Each part's gradient and mean loss by a plain loop in fp64, with a whole model of its own."""
    from launcher import recipe as recipes
    from launcher.part import Part, Seat

    case = next(case for case in world.of_joint() if case.stage == 0)
    context = ranks.context_of(case, 0)
    plan, recipe = context.plan.stages[0], recipes.parse(case.tree)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.tokenizer)
    gradients, losses = [], []
    for i, part_plan in enumerate((*plan.beside, plan)):
        stage, facts = recipe.stages[part_plan.index], case.prepared.facts[part_plan.index]
        part = Part(stage, part_plan, facts, tokenizer, Seat(0, 1, tokenizer.pad_token_id))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            case.prepared.model_directory,
            num_labels=len(facts.train.labels),
            ignore_mismatched_sizes=True,
        )
        state = {n.removeprefix("models.0.bert."): v for n, v in before.items() if ".bert." in n}
        model.bert.load_state_dict(state)
        start = f"models.{i}.classifier."
        model.classifier.load_state_dict(
            {n.removeprefix(start): v for n, v in before.items() if n.startswith(start)}
        )
        losses.append(backward(model.double().train(), part.batches.step(1)))
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    return gradients, losses


def backward(model: Any, batch: StepBatch) -> float:
    """The mean loss of a global batch, one sample at a time: no padding, no micro-batches."""
    mean = 0.0
    for micro_batch in batch.micro_batches:
        given = {name: torch.as_tensor(values) for name, values in micro_batch.features.items()}
        for row in range(len(micro_batch.samples)):
            length = int(given["attention_mask"][row].sum())
            logits = model(input_ids=given["input_ids"][row : row + 1, :length]).logits
            target = given["labels"][row : row + 1]
            loss = torch.nn.functional.cross_entropy(logits, target) / batch.num_samples
            loss.backward()
            mean += loss.item()
    return mean


@pytest.fixture(scope="module")
def separate(world: World, found: dict[str, Any]) -> tuple[list[dict], list[float]]:
    return reference(world, found["joint-0"]["before"])


def summed(separate: tuple[list[dict], list[float]], weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    """The sum of the parts' gradients, by the names that they have in the joint model."""
    first, second = separate[0]
    total = {
        f"models.0.{n}": weights[0] * first[n] + weights[1] * second[n]
        for n in first
        if n.startswith("bert.")
    }
    for i, gradients in enumerate((first, second)):
        total |= {
            f"models.{i}.{n}": weights[i] * g for n, g in gradients.items() if not n.startswith("bert.")
        }
    return total


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to its size."""
    assert set(found) == set(wanted)
    size = torch.cat([g.flatten() for g in wanted.values()]).norm()
    # What is 0 but for rounding, like the biases of keys in attention, is measured by the whole.
    return max(
        float((found[n].double() - wanted[n]).norm() / max(wanted[n].norm(), 1e-2 * size)) for n in wanted
    )


@pytest.mark.parametrize("stage", JOINT)
def test_the_joint_gradient_is_the_weighted_sum(found: dict, separate: Any, stage: int | str) -> None:
    told = found[f"joint-{stage}"]
    assert told["fillers"] == [2, 0], "the case should need fillers"
    difference = distance(told["gradients"], summed(separate, WEIGHTS))
    print(f"ZeRO-{stage}, joint gradient against the sum: {difference:.2g}")
    assert difference < 1e-5


def test_other_weights_would_give_another_gradient(found: dict, separate: Any) -> None:
    for weights in ((1.0, 1.0), (0.5, 1.99), (2.0, 0.5), (0.5, 0.0)):
        assert distance(found["joint-3"]["gradients"], summed(separate, weights)) > 1e-3


@pytest.mark.parametrize("stage", range(4))
def test_joint_losses_and_the_norm(found: dict, separate: Any, stage: int) -> None:
    told, losses = found[f"joint-{stage}"], separate[1]
    assert told["losses"] == pytest.approx(losses, rel=1e-5)
    assert [s / n for s, n in zip(told["sums"], (6, 10), strict=True)] == pytest.approx(losses, rel=1e-5)
    assert told["loss"] == pytest.approx(WEIGHTS[0] * losses[0] + WEIGHTS[1] * losses[1], rel=1e-5)
    whole = torch.cat([g.flatten() for g in summed(separate, WEIGHTS).values()]).norm()
    assert told["norm"] == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("stage", range(1, 4))
def test_all_zero_stages_start_the_same(found: dict, stage: int) -> None:
    one, other = found["joint-0"]["before"], found[f"joint-{stage}"]["before"]
    assert not parameters_that_moved(one, other)


# What moves, and what it costs


def of_layer(name: str) -> int:
    """0 the embeddings, then the layers, 3 what stands above."""
    for i in (0, 1):
        if f".layer.{i}." in name:
            return i + 1
    return 0 if ".embeddings." in name else 3


FREE = {
    "frozen": lambda name: of_layer(name) >= 2,
    "last": lambda name: of_layer(name) >= 2,
    "head": lambda name: of_layer(name) == 3,
    "lora": lambda name: ".lora_" in name or name.startswith("classifier."),
}
FREEZING = [
    "frozen-0",
    "frozen-1",
    "frozen-2",
    "frozen-3",
    "last-0",
    "last-1",
    "last-2",
    "head-0",
    "head-1",
    "head-2",
]


@pytest.mark.parametrize("name", ["jointly-frozen-0", "jointly-frozen-3", "jointly-lora-2"])
def test_what_the_main_stage_freezes_of_the_shared_trunk_stays_still(found: dict, name: str) -> None:
    before, *_, after = found[name]["snapshots"]
    free = FREE[name.split("-")[1]]
    assert parameters_that_moved(before, after) == {n for n in before if free(n)}


@pytest.mark.parametrize("name", [*FREEZING, "lora-2", "lora-3"])
def test_only_what_is_trained_moves(found: dict, name: str) -> None:
    told = found[name]
    moved = parameters_that_moved(told["snapshots"][0], told["snapshots"][-1])
    assert moved == {n for n in told["snapshots"][0] if FREE[name.partition("-")[0]](n)}


@pytest.mark.parametrize("name", [*FREEZING, "lora-2", "lora-3"])
def test_frozen_parameters_take_no_optimizer_memory(both: list[dict], name: str) -> None:
    told, stage = both[0][name], int(name[-1])
    trained = sum(v.numel() for n, v in told["snapshots"][0].items() if FREE[name.partition("-")[0]](n))
    assert told["num_trained"] == trained
    held = [rank[name]["moments"] for rank in both]
    if stage == 0:
        assert held == [2 * trained] * 2
    else:
        # Each tensor (ZeRO-3) or each group (1 and 2) is rounded up to what ranks can share.
        padding = 2 * 2 * (told["num_tensors"] if stage == 3 else 8 * len(told["groups"]))
        assert 2 * trained <= sum(held) <= 2 * trained + padding
        assert max(held) <= trained + padding


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layers_begin_to_move_when_their_time_has_come(found: dict, stage: int) -> None:
    snapshots = found[f"gradual-{stage}"]["snapshots"]
    first_moved = {}
    for step in range(1, len(snapshots)):
        for name in parameters_that_moved(snapshots[step - 1], snapshots[step]):
            first_moved.setdefault(name, step)
    # Of the last layer to the first, then the embeddings: one more every two steps.
    assert first_moved == {name: 2 * (3 - of_layer(name)) + 1 for name in snapshots[0]}
    assert parameters_that_moved(snapshots[-2], snapshots[-1]) == set(snapshots[0])


@pytest.mark.parametrize("stage", range(4))
def test_layers_move_by_their_own_learning_rates(found: dict, stage: int) -> None:
    before, after = found[f"decay-{stage}"]["snapshots"]
    reach: dict[str, float] = {}
    for name in before:
        place = "head" if name.startswith("classifier.") else str(of_layer(name))
        reach[place] = max(reach.get(place, 0.0), float((after[name] - before[name]).abs().max()))
    # Adam's first step is as long as the learning rate wherever the gradient is not tiny.
    wanted = {"head": 4.0, "3": 1.0, "2": 0.5, "1": 0.25, "0": 0.125}
    assert {place: far / LR for place, far in reach.items()} == pytest.approx(wanted, rel=1e-2)
    told = found[f"decay-{stage}"]
    assert told["rates"][0] == pytest.approx([LR * scale for _, scale, _ in told["groups"]])


# Exports and adapters


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**{n: v for n, v in batch.items() if n != "labels"}).logits


@pytest.mark.parametrize("name", ["lora-2", "lora-3", "trunk-lora", "grown"])
def test_an_export_answers_as_the_engine(found: dict, name: str) -> None:
    told = found[name]
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        told["folder"] / "export", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits_of(model, told["probe"]), told["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["lora-2", "lora-3", "trunk-lora"])
def test_peft_loads_an_adapter_with_the_same_answers(found: dict, name: str) -> None:
    from peft import PeftModel

    told = found[name]
    torch.manual_seed(99)  # What the adapter does not bring must not be left to chance.
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        told["base"], num_labels=3, ignore_mismatched_sizes=True
    )
    plain = logits_of(base, told["probe"])
    model = PeftModel.from_pretrained(base, told["folder"] / "adapter")
    assert torch.allclose(logits_of(model, told["probe"]), told["logits"], atol=1e-5)
    assert not torch.allclose(plain, told["logits"], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_of_language_models(found: dict, name: str) -> None:
    from peft import PeftModel

    told = found[name]
    assert told["trained"] and all(".lora_" in n for n in told["trained"])
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    base = transformers.AutoModelForCausalLM.from_pretrained(told["base"])
    assert (logits_of(base, ids) - told["logits"]).abs().max() > 1e-2, "the adapter should matter"
    merged = transformers.AutoModelForCausalLM.from_pretrained(told["folder"] / "export")
    assert torch.allclose(logits_of(merged, ids), told["logits"], atol=1e-5)
    alone = PeftModel.from_pretrained(base, told["folder"] / "adapter")
    assert torch.allclose(logits_of(alone, ids), told["logits"], atol=1e-5)


def test_modules_that_the_model_lacks_are_refused(found: dict) -> None:
    error = refused(found["wrong-modules"])
    assert "stages.target.trainable.lora" in error and "q_proj" in error and "lora.modules" in error


# Heads


def refused(result: Any) -> str:
    assert isinstance(result, ModelError), result
    assert isinstance(result, LauncherError) and result.exit_code == 2
    assert "\n" not in str(result)
    return str(result)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_matched_head_takes_the_rows_of_labels_it_knows(found: dict, stage: int) -> None:
    first, now = found["first"]["snapshots"][-1], found[f"match-{stage}"]
    for name in ("classifier.weight", "classifier.bias"):
        old, new = first[name], now[name]
        assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[0]), name
        assert not any(torch.equal(new[1], row) for row in old), name
    assert now["classifier.weight"][1].abs().max() < 0.2 and now["classifier.weight"][1].std() > 0.005
    assert not [n for n in first if not n.startswith("classifier.") and not torch.equal(first[n], now[n])]


def test_a_matched_head_is_the_same_in_every_zero_stage_and_rank(both: list[dict]) -> None:
    assert not parameters_that_moved(both[0]["match-0"], both[0]["match-3"])
    assert not parameters_that_moved(both[0]["match-3"], both[1]["match-3"])


def test_a_kept_head_is_the_one_before(found: dict) -> None:
    assert not parameters_that_moved(found["first"]["snapshots"][-1], found["keep"])


def test_a_head_with_other_labels_is_not_kept(both: list[dict]) -> None:
    for rank in both:
        error = refused(rank["keep-other"])
        assert "stages.target.head: keep" in error and "A, B, C" in error and "C, B, A" in error


def test_a_head_with_nothing_in_common_is_not_matched(both: list[dict]) -> None:
    for rank in both:
        error = refused(rank["match-none"])
        assert "stages.target.head: match" in error and "Aa, P" in error and "A, B, C" in error


def test_a_missing_pooler_is_drawn_the_same_on_all_ranks_and_stages(both: list[dict], world: World) -> None:
    one = both[0]["trunk-0"]
    for other in (both[1]["trunk-0"], both[0]["trunk-3"], both[1]["trunk-3"]):
        assert not parameters_that_moved(one, other)
    weight, bias = one[POOLER[1]], one[POOLER[0]]
    assert weight.shape == (32, 32) and 0.015 < weight.std() < 0.025 and not bias.any()
    trunk = transformers.BertForTokenClassification.from_pretrained(world.trunk)
    assert torch.equal(one[EMBEDDINGS], trunk.bert.embeddings.word_embeddings.weight)


# More tokens


def test_added_tokens_get_rows_and_old_rows_stay(found: dict, world: World) -> None:
    told = found["grown"]
    before = transformers.BertForTokenClassification.from_pretrained(world.trunk)
    old = before.bert.embeddings.word_embeddings.weight.detach()
    start = told["snapshots"][0][EMBEDDINGS]
    assert len(start) == len(old) + len(ADDED)
    assert torch.equal(start[: len(old)], old)
    assert start[len(old) :].abs().max() > 0 and not torch.equal(start[-1], start[-2])


def test_the_export_has_the_added_tokens(found: dict) -> None:
    told = found["grown"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(told["folder"] / "export")
    for i, word in enumerate(ADDED):
        assert tokenizer.encode(word, add_special_tokens=False) == [320 + i]
    assert len(tokenizer) == 322
    config = transformers.AutoConfig.from_pretrained(told["folder"] / "export")
    assert config.vocab_size == 322
