"""What a run has cost: the price of its nodes, and how long all of its tries took. Pure."""

from typing import Any

Tree = dict[str, Any]


def paid(plan: Tree, report: Tree) -> float | None:
    """Return what all tries of a run have cost together, in the currency of its price; None: no price is known.

    Args:
        plan: its plan.json: with the price an hour of the whole cluster, where one was given.
        report: its report.json.
    """
    price = (plan.get("cluster") or {}).get("price_per_hour")
    return None if price is None or not report else price * all_tries_s(report) / 3600


def all_tries_s(report: Tree) -> float:
    """Return how long all tries took together, each from the begin of its process, by the run's report.json."""
    return sum(_try_s(each) for each in [*(report.get("earlier") or []), report])


def _try_s(told: Tree) -> float:
    begun, ended = told.get("begun"), told.get("ended")
    first = (told.get("startup") or {}).get("begun", begun)
    if first is not None and ended is not None:
        return max(0.0, float(ended) - float(first))
    # It goes on, or its driver is lost: `seconds` counts from `begun`, when the workers were asked for.
    before = float(begun) - float(first) if begun is not None and first is not None else 0.0
    return float(told.get("seconds") or 0.0) + max(0.0, before)
