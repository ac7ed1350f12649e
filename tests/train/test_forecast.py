"""The forecast against real engines: what two ranks hold and use is what was said; closing gives it back."""

from typing import Any

import pytest

from benchmarks import memory as bench
from benchmarks.memory_cases import ROWS

pytestmark = pytest.mark.timeout(1200)

CASES = (
    ("llama", "zero2", 1, {"trainable": {"lora": {"rank": 4}}}),
    ("llama", "zero3", 1, {"activation_checkpointing": True}),
    ("llama", "zero1", 1, {"activation_checkpointing": "selective"}),
    # One micro-batch, as without sharing: gradients of one before would be counted with the activations.
    ("llama", "zero0", 2, {"global_batch": ROWS}),
    ("t5", "zero3", 1, {}),
)
"""Architecture, ds config, workers that share a sample, and what the stage says."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, (predicted, measured) bytes by what, and what is left when the engine is closed."""
    folder = tmp_path_factory.mktemp("memory")
    bench.make_data(folder)
    jobs = [
        bench.job_of(
            {"name": f"{arch}-{ds}", "arch": arch, "size": "small", "ds": ds, "team": team, "stage": stage},
            folder,
        )
        for arch, ds, team, stage in CASES
    ]
    found = bench.measured(jobs, folder)
    return {
        job["name"]: bench.compared(job, found[job["name"]]) | {"left": found[job["name"]]["left"]}
        for job in jobs
    }


@pytest.mark.parametrize(("arch", "ds"), [case[:2] for case in CASES])
@pytest.mark.parametrize(
    ("what", "tolerance"), [("states", 0.05), ("activations", 0.15), ("update", 0.05), ("peak", 0.05)]
)
def test_what_is_used_is_what_was_said(
    compared: dict[str, Any], arch: str, ds: str, what: str, tolerance: float
) -> None:
    predicted, measured = compared[f"{arch}-{ds}"][what]
    assert predicted == pytest.approx(measured, rel=tolerance)


def test_a_closed_engine_gives_its_memory_back(compared: dict[str, Any]) -> None:
    assert max(each["left"] for each in compared.values()) < 100_000
