"""Numbers gone wrong in real DeepSpeed engines: found before the update, in every ZeRO stage and precision."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.train.numbers import FEWEST, Rule
from tests.conftest import make_tokenizer, sentence, write_jsonl
from tests.train import numbers_ranks
from tests.train.transfer_ranks import case

pytestmark = pytest.mark.timeout(900)
STEPS, ROWS, BATCH, BAD = 6, 24, 8, 11
NORMAL = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
KINDS = [f"zero{stage} {dtype}" for stage, dtype in NORMAL]
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def regression(folder: Path, bad: float, dtype: str) -> dict[str, Any]:
    """A recipe of regression on numbers near 0, one of which is not."""
    draw = random.Random(0)
    rows = [{"text": sentence(draw, draw.randint(3, 9)), "label": draw.random()} for _ in range(ROWS)]
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(tokenizer, [str(row["text"]) for row in rows])
    rows[BAD]["label"] = bad
    stage = {
        "name": "only",
        "task": "text-classification",
        "data": {"train": str(write_jsonl(folder / f"{bad:g}.jsonl", rows)), "label_type": "number"},
        "steps": STEPS,
        "global_batch": BATCH,
        "micro_batch": 2,
        "learning_rate": 1e-3,
        "batching": "random",
        "max_length": 64,
    }
    return {"model": {"config": BERT, "tokenizer": str(tokenizer), "dtype": dtype}, "stages": [stage]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("numbers")
    cases = [
        case(f"zero{stage} {dtype}", "", stage, regression(folder, 1e38, dtype), folder)
        for stage, dtype in NORMAL
    ]
    spike = regression(folder, 500.0, "fp32") | {"spike": 20.0}
    cases.append(case("spike", "", 2, spike, folder))
    return numbers_ranks.run(cases, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_is_skipped_and_changes_nothing(found: list[dict[str, Any]], kind: str) -> None:
    first, second = (rank[kind]["skipping"] for rank in found)
    print(kind, first["optimizer"], first["faults"], first["losses"], first["norms"])
    assert first["faults"] == second["faults"]
    bad = [i for i, fault in enumerate(first["faults"]) if fault]
    assert len(bad) == STEPS * BATCH // ROWS and all(first["faults"][i] == "the loss is inf" for i in bad)
    for rank in (first, second):
        assert rank["changed"] == [i not in bad for i in range(STEPS)]
        assert all(math.isfinite(rank["losses"][i]) for i in range(STEPS) if i not in bad)
        assert all(torch.isfinite(each).all() for each in rank["weights"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_is_as_if_the_batch_had_never_been(found: list[dict[str, Any]], kind: str) -> None:
    skipping, without = found[0][kind]["skipping"], found[0][kind]["without"]
    assert {each for each in without["faults"] if each} == {"passed by: it went wrong before"}
    assert not without["told"]
    for name, weights in skipping["weights"].items():
        assert torch.equal(weights, without["weights"][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_of_all_ranks_are_told(found: list[dict[str, Any]], kind: str) -> None:
    told = found[0][kind]["skipping"]["told"]
    assert told == found[1][kind]["skipping"]["told"]
    for each in told:
        assert len(each["samples"]["only"]) == BATCH and each["loss"] == "inf"
        # The one and its neighbour: those of its micro-batch.
        assert BAD in each["suspects"]["only"] and len(each["suspects"]["only"]) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_stop_is_an_error_on_every_rank_before_the_update(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        stopping = rank[kind]["stopping"]
        assert not stopping["changed_by_error"]
        step = len(stopping["losses"]) + 1
        assert (stopping["error"].stage, stopping["error"].step) == ("only", step)
        assert f"stage only, step {step}: the loss is inf" in str(stopping["error"])


def test_a_spike_is_skipped_like_a_loss_that_is_no_number(found: list[dict[str, Any]]) -> None:
    first, second = (rank["spike"]["skipping"] for rank in found)
    assert first["faults"] == second["faults"]
    bad = [i for i, fault in enumerate(first["faults"]) if fault]
    assert len(bad) == 2 and all("deviations above the mean" in first["faults"][i] for i in bad)
    for rank in (first, second):
        assert rank["changed"] == [i not in bad for i in range(STEPS)]
    for told in first["told"]:
        assert BAD in told["samples"]["only"] and told["loss"] > 1000 and not told["suspects"]["only"]


def test_a_spike_is_judged_by_the_last_losses() -> None:
    rule = Rule(spike=6.0)
    draw = random.Random(0)
    for step in range(300):
        loss = 2.0 + draw.gauss(0, 0.1)
        assert rule.fault(loss, 1.0) == "", step
        rule.losses.append(loss)
    assert "above the mean 2" in rule.fault(3.0, 1.0)
    assert rule.fault(1.0, 1.0) == "" == Rule().fault(1e9, 1e9)


def test_few_losses_and_equal_ones_make_no_spike() -> None:
    rule = Rule(spike=6.0)
    rule.losses.extend([1.0] * (FEWEST - 1))
    assert rule.fault(100.0, 1.0) == ""
    rule.losses.append(1.0)
    assert rule.fault(1.05, 1.0) == "" and rule.fault(1.07, 1.0)


def test_a_norm_that_is_no_number_is_a_fault_unless_the_scale_can_fall() -> None:
    assert Rule().fault(1.0, math.inf) == "the gradient's norm is inf"
    assert Rule().fault(1.0, math.nan) == "the gradient's norm is nan"
    assert Rule().fault(1.0, math.inf, heals=True) == ""
    assert Rule().fault(math.nan, math.inf, heals=True) == "the loss is nan"
