"""Loading: under ZeRO-3 no rank ever holds the whole model, and what it holds is what the forecast said."""

from typing import Any

import pytest

from benchmarks import load as bench

pytestmark = pytest.mark.timeout(300)

CASES = (("zero0", "fp32"), ("zero3", "fp32"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By case, what two ranks found while they loaded a model of 150 million parameters."""
    folder = tmp_path_factory.mktemp("load")
    bench.make_model(folder / "model", 150)
    return {case: bench.compared(case, folder / "model", folder) for case in CASES}


def test_no_rank_holds_the_whole_model_under_zero_3(found: dict[Any, Any]) -> None:
    result = found["zero3", "fp32"]
    for rank in result["ranks"]:
        assert rank["held"] == pytest.approx(result["whole"] / bench.NUM_RANKS, rel=0.01)
        assert rank["peak"] < 0.75 * result["whole"]


def test_without_zero_3_each_rank_holds_the_whole_model(found: dict[Any, Any]) -> None:
    result = found["zero0", "fp32"]
    assert min(rank["peak"] for rank in result["ranks"]) > 0.95 * result["whole"]


@pytest.mark.parametrize("case", CASES)
def test_what_loading_takes_is_what_was_said(found: dict[Any, Any], case: tuple[str, str]) -> None:
    assert found[case]["predicted of measured"] == pytest.approx(1.0, rel=0.1)


def test_what_is_loaded_is_what_the_files_hold(found: dict[Any, Any]) -> None:
    for result in found.values():
        assert all(rank["is_same"] for rank in result["ranks"])
