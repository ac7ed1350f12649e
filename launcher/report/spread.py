"""Several runs of one recipe that differ by their seeds: mean and spread of every metric. Pure."""

import math
import statistics
from typing import Any


def of_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation (of the sample; 0 for one run) and values of all metrics.

    Args:
        summaries: one a run, as in its summary.json.
    """
    names = list(summaries[0]["stages"])
    stages = {
        name: {
            "metrics": _spread([summary["stages"][name].get("metrics", {}) for summary in summaries]),
            "after": _spread([summary["stages"][name].get("after", {}) for summary in summaries]),
        }
        for name in names
    }
    transfers = [summary.get("transfer", {}) for summary in summaries]
    gains = [{"gain": each["gain"]} for each in transfers if "gain" in each]
    result: dict[str, Any] = {"num_seeds": len(summaries), "stages": stages}
    if len(gains) == len(summaries):
        result["transfer"] = {"metric": transfers[0]["metric"], **_spread(gains)}
    return result


def _spread(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {name: _of([run.get(name, math.nan) for run in runs]) for name in (runs[0] if runs else {})}


def _of(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "stdev": spread, "values": values}
