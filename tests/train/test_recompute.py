"""Activations that are computed again: the same gradients, and how much is kept for them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.train import recompute

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def trained(how: str) -> tuple[Tensor, int]:
    """Return the whole gradient of one step, and the work of the products of matrices that it took."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).train()
    model.config.use_cache = False
    if how != "plain":
        recompute.turn_on(model, keeps_products=how == "selective")
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counted:
        model(ids, labels=ids).loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters()]), counted.get_total_flops()


@pytest.mark.parametrize("how", ["all", "selective"])
def test_gradients_are_the_same(how: str) -> None:
    assert torch.equal(trained(how)[0], trained("plain")[0])


def test_products_are_computed_again_only_where_all_is() -> None:
    plain, selective, every = (trained(how)[1] for how in ("plain", "selective", "all"))
    assert selective == plain < every
