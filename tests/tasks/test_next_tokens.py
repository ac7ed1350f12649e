"""The loss in tiles against the plain one: values, gradients, memory; and where it has to be plain."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from launcher import recipe
from launcher.tasks import next_tokens
from launcher.tasks.base import IGNORED
from launcher.tasks.causal_lm import CausalLM

ROWS, LENGTH = 3, 17
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def model_of(kind: str = "llama", vocabulary: int = 50, **keys: Any) -> Any:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        **SHAPE | keys,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch_of(vocabulary: int = 50, rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, length), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, IGNORED, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def task_of(tile_bytes: int | None) -> CausalLM:
    tree = {"model": {"path": "m"}, "stages": [{"name": "s", "task": "causal-lm", "data": {"train": "x"}}]}
    task = CausalLM(recipe.parse(tree).stages[0])
    task.tiles = next_tokens.Tiles(tile_bytes)
    return task


def loss_and_gradients(model: Any, task: CausalLM, batch: dict[str, torch.Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    loss = task.loss(task.outputs(model, None, batch), batch)
    (loss * 0.37).backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


PLAIN = 2**30


@pytest.mark.parametrize("tokens_per_tile", [5, 1000])
def test_a_cpu_makes_logits_only_of_what_bears_loss(
    tokens_per_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(next_tokens.TILE_BYTES, "cpu", 4 * 50 * tokens_per_tile)
    monkeypatch.setattr(next_tokens, "FEWEST", 3)
    model, batch = model_of(), batch_of()
    plain, wanted = loss_and_gradients(model, task_of(PLAIN), batch)
    sizes = []
    tile = next_tokens._tile
    monkeypatch.setattr(next_tokens, "_tile", lambda h, *rest: sizes.append(len(h)) or tile(h, *rest))
    found, gradients = loss_and_gradients(model, task_of(None), batch)
    assert found == pytest.approx(plain, rel=1e-5)
    for name, value in wanted.items():
        assert torch.allclose(gradients[name], value, rtol=1e-5, atol=1e-6), name
    bearing = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert sum(sizes) == bearing < ROWS * LENGTH
    assert max(sizes) == min(tokens_per_tile, bearing)
    # A row that only stands in for one has no label at all.
    nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    loss, gradients = loss_and_gradients(model, task_of(None), nothing)
    assert loss == 0
    assert all(float(value.abs().max()) == 0 for value in gradients.values())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("tokens_per_tile", [1, 7, 50])
def test_loss_and_gradients_are_the_plain_ones(is_tied: bool, tokens_per_tile: int) -> None:
    model, batch = model_of(tie_word_embeddings=is_tied), batch_of()
    plain, wanted = loss_and_gradients(model, task_of(PLAIN), batch)
    tiled, found = loss_and_gradients(model, task_of(4 * 50 * tokens_per_tile), batch)
    assert tiled == pytest.approx(plain, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_bf16_is_as_near_to_fp32_as_the_plain_loss() -> None:
    batch = batch_of()
    true = loss_and_gradients(model_of(), task_of(PLAIN), batch)[1]["lm_head.weight"]
    off = []
    for tile in (PLAIN, 4 * 50 * 7):
        found = loss_and_gradients(model_of().bfloat16(), task_of(tile), batch)[1]["lm_head.weight"]
        off.append(float((found.float() - true).norm() / true.norm()))
    assert off[1] < 1.5 * off[0]


def test_what_is_frozen_gets_no_gradient() -> None:
    model, batch = model_of(), batch_of()
    model.lm_head.weight.requires_grad_(False)
    _, wanted = loss_and_gradients(model, task_of(PLAIN), batch)
    _, found = loss_and_gradients(model, task_of(800), batch)
    assert found.keys() == wanted.keys() and "lm_head.weight" not in found
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_without_labels_the_loss_is_0_and_has_a_gradient() -> None:
    model, batch = model_of(), batch_of()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, gradients = loss_and_gradients(model, task_of(800), batch)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_logits_are_whole_in_evaluation() -> None:
    model, batch = model_of().eval(), batch_of()
    assert task_of(800).outputs(model, None, batch).shape == (ROWS, LENGTH, 50)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}), ("granite", {"logits_scaling": 4.0})],
)
def test_a_model_that_changes_its_logits_keeps_them_whole(kind: str, keys: dict[str, Any]) -> None:
    model, batch = model_of(kind, **keys), batch_of()
    assert task_of(800).outputs(model, None, batch).shape == (ROWS, LENGTH, 50)


def test_a_hidden_change_of_the_logits_is_seen() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits * 2
            return outputs

    model, batch = Doubled(model_of().config).train(), batch_of()
    plain = loss_and_gradients(model, task_of(PLAIN), batch)
    tiled = loss_and_gradients(model, task_of(800), batch)
    assert tiled[0] == plain[0]


def peak_of(run: Callable[[], None]) -> int:
    """The most bytes in use at once, over those there at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [change for _, change in sorted((e.start_ns(), e.nbytes()) for e in events)]
    return max(itertools.accumulate(changes))


def test_peak_memory_is_lower_for_a_large_vocabulary() -> None:
    vocabulary = 20_000
    model, batch = model_of(vocabulary=vocabulary), batch_of(vocabulary, rows=1, length=512)
    logits = 4 * 512 * vocabulary
    peaks = []
    for task in (task_of(PLAIN), task_of(logits // 16)):
        peaks.append(peak_of(lambda task=task: task.loss(task.outputs(model, None, batch), batch).backward()))
    plain, tiled = peaks
    print(f"plain {plain / 1e6:.0f} MB, in tiles {tiled / 1e6:.0f} MB, logits {logits / 1e6:.0f} MB")
    assert plain > 2 * logits
    assert tiled < logits / 2
