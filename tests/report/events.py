"""Records for the tests of what shows them."""

from typing import Any

BEGIN_S = 1000.0


def begin(stage: str = "source", num_steps: int = 100, **more: Any) -> dict[str, Any]:
    """A stage's begin, at BEGIN_S."""
    told = {"kind": "stage_begin", "time": BEGIN_S, "stage": stage, "start": 0, "num_workers": 2}
    return told | {"num_nodes": 1, "num_steps": num_steps, "units_per_step": 8, "unit": "samples"} | more


def step(number: int, stage: str = "source", **more: Any) -> dict[str, Any]:
    """A step of one second that ends at BEGIN_S + number."""
    told = {"kind": "step", "time": BEGIN_S + number, "stage": stage, "step": number, "loss": 1.0 / number}
    told |= {"lr": 1e-4, "epoch": 0, "samples": 8, "tokens": 100, "slots": 125, "step_s": 1.0, "data_s": 0.01}
    return told | more


def run(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What is known of a run beforehand."""
    return {
        "kind": "run",
        "name": "it",
        "stages": list(stages),
        "save_steps": None,
        "save_minutes": 15.0,
    } | more
