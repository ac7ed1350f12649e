"""Long samples without a second rank: what is refused, networks in tiles, and what the forecast makes of both."""

from typing import Any

import pytest
import torch

from launcher import footprint
from launcher import recipe as recipes
from launcher.errors import ModelError
from launcher.plan.plan import ModelFacts, SplitFacts, StageFacts, World, make_plan
from launcher.plan.shapes import Shapes
from launcher.train import recompute, sequence
from tests.tasks.test_next_tokens import SHAPE, batch_of, model_of, peak_of


@pytest.mark.parametrize(
    ("keys", "attention", "size", "says"),
    [
        ({}, "sdpa", 4, "the model has 2 attention heads, which 4 does not divide"),
        ({}, "eager", 2, "its attention (eager) is in its own code"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "sdpa",
            2,
            "its positions are scaled by the length of a sample (dynamic)",
        ),
    ],
)
def test_models_that_cannot_be_divided_are_refused(
    keys: dict[str, Any], attention: str, size: int, says: str
) -> None:
    model = model_of(**keys)
    model.set_attn_implementation(attention)
    with pytest.raises(ModelError) as refused:
        sequence.check(model, size)
    assert str(refused.value) == (
        f"LlamaForCausalLM: samples cannot be divided among {size} workers, since {says}: leave"
        " sequence_parallel_size out of the ds config"
    )


@pytest.mark.parametrize("tokens", [5, 17, 100])
def test_networks_in_tiles_give_the_same_gradients(tokens: int) -> None:
    batch, found = batch_of(), []
    for is_tiled in (False, True):
        model = model_of()
        if is_tiled:
            recompute.tile(model, tokens)
            assert len(list(recompute.tiled(model))) == 2
        model(**batch).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-7), name


def test_networks_in_tiles_hold_less() -> None:
    batch, peaks = batch_of(rows=1, length=1024), []
    for tokens in (None, 64):
        model = model_of(intermediate_size=2000)
        recompute.turn_on(model)
        if tokens is not None:
            recompute.tile(model, tokens)
        peaks.append(peak_of(lambda model=model: model(**batch).loss.backward()))
    whole = 4 * 1024 * 2000
    print(
        f"peak {peaks[0] / 1e6:.1f} MB, in tiles {peaks[1] / 1e6:.1f} MB; one tensor of a network {whole / 1e6:.1f}"
    )
    assert peaks[1] < peaks[0] - 3 * whole


def shapes_of(team: int, length: int = 4096, vocabulary: int = 1000, **keys: Any) -> Shapes:
    """What is forecast of a stage on two workers."""
    config = (
        SHAPE | {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 10**6} | keys
    )
    stage = {
        "name": "s",
        "task": "causal-lm",
        "data": {"train": "x"},
        "max_length": length,
        "micro_batch": 1,
        "activation_checkpointing": True,
    }
    asked = recipes.parse({"model": {"config": config, "tokenizer": "x"}, "stages": [stage]})
    facts = (StageFacts(train=SplitFacts(about_rows=9, num_samples=9, is_settled=True), eval=None),)
    ds = {"sequence_parallel_size": team}
    plan = make_plan(asked, ds, "ds", ModelFacts(), facts, World(num_workers=2, device="cuda"))
    return footprint.of_stage(asked, plan.stages[0], facts, dtype="bf16", device="cuda")


def test_the_forecast_follows_pieces_and_tiles() -> None:
    whole, half = shapes_of(1), shapes_of(2)
    assert (whole.plain.length, half.plain.length) == (4096, 2048)
    assert half.plain.held == pytest.approx(whole.plain.held / 2, rel=0.3)
    assert half.plain.flops == pytest.approx(whole.plain.flops / 2, rel=0.01)
    # 4,096 tokens of 100,000 words: 1.6 GB of logits in fp32, and never whole.
    assert shapes_of(1, vocabulary=100_000).plain.peak(0) < 4 * 4096 * 100_000 / 2
    # Below and above the tokens that a feed-forward network takes at once: its tensors stay as large as a tile.
    lengths = (32_000, 33_000)
    wide = [shapes_of(1, each, intermediate_size=4000).checkpointed for each in lengths]
    assert wide[0] is not None and wide[1] is not None
    assert wide[1].peak(0) < wide[0].peak(0) / 2


def test_what_the_config_forbids_is_refused_before_there_are_workers() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ModelError, match="samples cannot be divided among 2 workers"):
        shapes_of(2, rope_parameters=rope)
