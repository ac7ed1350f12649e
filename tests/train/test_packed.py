"""Packs against the samples alone: the same loss and gradient, and a self-test that tells right from wrong."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, modeling_flash_attention_utils

from launcher.errors import ModelError
from launcher.train import compiled, packed, varlen

VOCABULARY = 97
# The second pack has a sample of one token, the third a single sample and much padding, the last is full.
PACKS = [[9, 12, 5], [20, 1, 7], [11], [16, 16]]
LENGTH = 32
WINDOW = 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    # Attention has to matter, or a leak would not show in the losses.
    "initializer_range": 0.15,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows in its second layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "mistral with windows": {"model_type": "mistral", "sliding_window": WINDOW},
    "gpt2": {"model_type": "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Models this small gain nothing from more, and lose much when the cores are busy.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(attention: str, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | settings)
    # A model as loaded for training, except that its cache is on, as it is by default.
    usual = "sdpa" if attention == "bounds" else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=usual).to(dtype)
    if attention == "bounds":
        varlen.turn_on(model, torch.device("cpu"))
    return model


def _batch(packs: list[list[int]] = PACKS, length: int = LENGTH) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (len(packs), length), generator=draw)
    positions, labels = torch.empty_like(ids), torch.full_like(ids, -100)
    for row, lengths in enumerate(packs):
        start = 0
        for count in lengths:
            positions[row, start : start + count] = torch.arange(count)
            labels[row, start + 1 : start + count] = ids[row, start + 1 : start + count]
            start += count
        positions[row, start:] = torch.arange(length - start)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _samples(tensors: dict[str, Tensor], packs: list[list[int]] = PACKS) -> list[tuple[int, slice]]:
    spans = []
    for row, lengths in enumerate(packs):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans += [(row, slice(end - count, end)) for end, count in zip(ends, lengths, strict=True)]
    return spans


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token (packs, length - 1), shifted as the task does; 0 where ignored."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _as_told(model):
    return lambda tensors: model(**packed.inputs(model, tensors)).logits


def _without_mask(model):
    def forward(tensors):
        # The 2-dimensional mask keeps transformers from looking at the position_ids.
        mask = torch.ones_like(tensors["input_ids"])
        return model(tensors["input_ids"], attention_mask=mask, position_ids=tensors["position_ids"]).logits

    return forward


def _with_cache(model):
    return lambda t: model(t["input_ids"], position_ids=t["position_ids"], use_cache=True).logits


def _ids_alone(model):
    return lambda tensors: model(tensors["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager", "bounds"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_trains_like_its_samples_alone(name, attention):
    model, tensors = _model(attention, **MODELS[name]), _batch()
    logits = _as_told(model)(tensors)
    assert logits.shape == (len(PACKS), LENGTH, VOCABULARY)
    in_packs = _losses(logits, tensors["labels"])
    gradient = _gradient(model, in_packs.sum())

    total = torch.zeros(())
    for row, span in _samples(tensors):
        if span.stop - span.start == 1:
            continue
        alone = tensors["input_ids"][row : row + 1, span]
        losses = _losses(model(alone, use_cache=False).logits, alone)
        torch.testing.assert_close(in_packs[row, span.start : span.stop - 1], losses[0], atol=1e-5, rtol=1e-5)
        total = total + losses.sum()
    expected = _gradient(model, total)
    torch.testing.assert_close(in_packs.sum(), total, atol=1e-5, rtol=1e-5)
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_comparison_has_teeth():
    model, tensors = _model("sdpa", **MODELS["llama"]), _batch()
    right, wrong = (
        _losses(make(model)(tensors), tensors["labels"]).sum() for make in (_as_told, _without_mask)
    )
    assert (right - wrong).abs() > 1e-3 * right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "bounds"])
@pytest.mark.parametrize("name", MODELS)
def test_the_self_test_passes_what_is_right(name, attention, dtype):
    model = _model(attention, dtype, **MODELS[name])
    packed.self_test(model, _as_told(model), _batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_allows_experts_their_noise(dtype):
    model = _model("sdpa", dtype, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    packed.self_test(model, _as_told(model), _batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wrong", [_without_mask, _with_cache, _ids_alone])
@pytest.mark.parametrize("name", ["llama", "mistral with windows", "gpt2"])
def test_the_self_test_refuses_a_leak(name, wrong, attention, dtype):
    # As weights are drawn by default: the leak is no larger than it has to be.
    model = _model(attention, dtype, **MODELS[name] | {"initializer_range": 0.02})
    with pytest.raises(ModelError, match=rf"{type(model).__name__} with {attention} .*batching: bucketed"):
        packed.self_test(model, wrong(model), _batch())


def test_the_self_test_refuses_a_leak_from_later_samples():
    model = _model("eager", **MODELS["llama"])

    def forward(tensors):
        given = packed.inputs(model, tensors)
        # Each token may also see the last one of the pack, whichever sample that is in.
        given["attention_mask"] = given["attention_mask"].clone()
        given["attention_mask"][..., -1] = 0
        return model(**given).logits

    with pytest.raises(ModelError, match="see each other"):
        packed.self_test(model, forward, _batch([[20, 12]]))


@pytest.mark.parametrize("packs", [[[LENGTH]], [[LENGTH], [LENGTH]], [[LENGTH], [10, 22]]])
def test_the_self_test_cuts_packs_of_one_sample(packs):
    model, tensors = _model("sdpa", **MODELS["llama"]), _batch(packs)
    before = tensors["position_ids"].clone()
    packed.self_test(model, _as_told(model), tensors)
    assert torch.equal(tensors["position_ids"], before)
    with pytest.raises(ModelError, match="see each other"):
        packed.self_test(model, _with_cache(model), tensors)


def test_the_self_test_runs_forward_three_times_in_eval_mode_and_restores_it():
    model, tensors = _model("sdpa", **MODELS["gpt2"] | {"resid_pdrop": 0.5}), _batch()
    model.train()
    model.transformer.wte.eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def forward(given):
        seen.append((model.training, torch.is_grad_enabled()))
        return _as_told(model)(given)

    packed.self_test(model, forward, tensors)
    assert seen == [(False, False)] * 3
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ModelError):
        packed.self_test(model, _ids_alone(model), tensors)
    assert [module.training for module in model.modules()] == modes


def test_the_self_test_refuses_logits_that_prove_nothing():
    model = _model("sdpa", **MODELS["llama"])
    with pytest.raises(ModelError, match="do not depend on its tokens"):
        packed.self_test(model, lambda t: torch.ones(*t["input_ids"].shape, VOCABULARY), _batch())
    keeps = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    with pytest.raises(ModelError, match="do not depend on its tokens"):
        packed.self_test(model, lambda t: _as_told(model)(t) * keeps, _batch())
    with pytest.raises(ModelError, match="not finite"):
        packed.self_test(model, lambda t: _as_told(model)(t) * float("nan"), _batch())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "bloom", "n_layer": 1, "n_head": 4}, "BloomForCausalLM takes no position_ids"),
        (
            {"model_type": "mpt", "d_model": 32, "n_layers": 1, "n_heads": 4},
            "MptForCausalLM takes no position",
        ),
        ({"model_type": "mamba", "num_hidden_layers": 1}, "MambaForCausalLM takes no position_ids"),
        ({"model_type": "rwkv", "num_hidden_layers": 1}, "RwkvForCausalLM takes no position_ids"),
        ({"model_type": "falcon", "alibi": True}, "FalconForCausalLM uses ALiBi"),
        ({"model_type": "recurrent_gemma"}, "RecurrentGemmaForCausalLM has linear_attention layers"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused_by_name(settings, reason):
    with torch.device("meta"):
        model = _model("eager", **settings)
    with pytest.raises(ModelError, match=f"{reason}.*batching: bucketed"):
        packed.check(model)


def test_an_unknown_attention_is_refused():
    model = _model("sdpa", **MODELS["llama"])
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .*paged\|sdpa"):
        packed.check(model)


def test_flash_attention_is_given_lengths_by_the_names_transformers_has():
    model, tensors = _model("sdpa", **MODELS["llama"]), _batch()
    model.config._attn_implementation = "flash_attention_2"
    packed.check(model)
    given = packed.inputs(model, tensors)
    assert given["input_ids"].shape == given["position_ids"].shape == (len(PACKS), LENGTH)
    assert given["use_cache"] is False and "attention_mask" not in given
    bounds = [0, 9, 21, 26, 32, 52, 53, 60, 64, 75, 96, 112, 128]
    for side in "qk":
        assert given[f"cu_seq_lens_{side}"].tolist() == bounds
        assert given[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert given[f"max_length_{side}"] == 21 and type(given[f"max_length_{side}"]) is int
    flash = modeling_flash_attention_utils
    names = set(given) - {"input_ids", "position_ids", "use_cache"}
    assert names == set(flash.FlashAttentionKwargs.__annotations__)
    assert names <= set(inspect.signature(flash._flash_attention_forward).parameters)


class _Closed(LlamaForCausalLM):
    """A model whose forward takes nothing but its own arguments, as some code on the hub does."""

    def forward(self, input_ids, position_ids=None, use_cache=None):
        return super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)


def test_flash_attention_is_refused_for_models_that_take_no_lengths():
    model = _Closed(AutoConfig.for_model(**SIZES | MODELS["llama"]))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"_Closed passes no sample lengths .*sdpa"):
        packed.check(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_bounds_take_the_place_of_a_mask(name):
    model, tensors = _model("bounds", **MODELS[name]), _batch()
    assert packed.attention_of(model) == varlen.NAME
    mask = packed.inputs(model, tensors)["attention_mask"]
    # Padding is a segment of its own; the longest is the third pack's.
    assert mask[0, 0, 0].tolist() == [0, 9, 21, 26, 32, 52, 53, 60, 64, 75, 96, 112, 128]
    assert mask.shape[2] == 21
    # Without bounds it attends as sdpa does: over a padded batch of samples.
    ids = tensors["input_ids"][:2, :9]
    padded = torch.ones_like(ids)
    padded[1, 5:] = 0
    given = {"attention_mask": padded, "use_cache": False}
    plain = _model("sdpa", **MODELS[name])
    assert torch.equal(model(ids, **given).logits, plain(ids, **given).logits)


LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize(
    "settings",
    [MODELS["mistral with windows"], MODELS["qwen2 with windows in its second layer"], LATENT],
    ids=["mistral", "qwen2", "latent"],
)
def test_windows_and_latent_attention_keep_their_mask(settings):
    assert packed.attention_of(_model("bounds", **settings)) == "sdpa"


def test_bounds_are_taken_anew_where_the_self_test_cuts_a_pack():
    model, tensors = _model("bounds", **MODELS["llama"]), _batch([[LENGTH]])
    tensors[packed.BOUNDS] = packed.bounds(tensors["position_ids"], torch.device("cpu"))
    packed.self_test(model, _as_told(model), tensors)


@pytest.mark.slow
def test_a_compiled_trunk_takes_packs_of_any_number_of_samples():
    model, plain = _model("bounds", **MODELS["llama"]), _model("bounds", **MODELS["llama"])
    model.config.use_cache = plain.config.use_cache = False
    compiled.turn_on(model)
    torch._dynamo.reset()
    for packs in (PACKS, [[5, 4, 3, 20], [32]], [[16, 16], [1, 31], [8, 8, 8, 8]]):
        tensors = _batch(packs)
        losses = [_losses(_as_told(each)(tensors), tensors["labels"]).sum() for each in (model, plain)]
        gradients = [_gradient(each, loss) for each, loss in zip((model, plain), losses, strict=True)]
        torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()
    # One graph, whatever the samples: nothing breaks it up.
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.slow
def test_evaluation_leaves_what_is_compiled_aside():
    model, seen = _model("sdpa", **MODELS["llama"]), []
    compiled.turn_on(model)
    tensors = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "use_cache": False}

    @compiled.aside_in
    def evaluated():
        seen.append(model(**tensors).logits)

    model(**tensors)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.eval()
    with torch.no_grad():
        evaluated()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert seen[0].shape == (1, 4, VOCABULARY)
