"""The Grafana dashboard as Prometheus would answer it: its queries, their selectors, and whether these find anything."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT

FILE = ROOT / "cluster" / "grafana" / "launcher.json"
NEEDS_A_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel.

    Attributes:
        shown: the labels that its legend wants.
    """

    panel: str
    text: str
    shown: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of an endpoint."""

    name: str
    labels: dict[str, str]


def dashboard() -> dict[str, Any]:
    """Return the dashboard as written."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def queries(window: str = "1m") -> list[Query]:
    """Return all queries, with all runs chosen, as Grafana puts that in."""
    return [
        Query(
            panel=panel["title"],
            text=target["expr"].replace("$run", ".*").replace("$window", window),
            shown=frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"])),
        )
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def samples(text: str) -> list[Sample]:
    """Return what an endpoint shows."""
    families = text_string_to_metric_families(text)
    return [Sample(one.name, one.labels) for family in families for one in family.samples]


def unanswered(query: Query, there: list[Sample]) -> list[str]:
    """Return what of a query finds nothing: selectors, and labels that it groups or shows by."""
    wrong = []
    grouped: set[str] | None = None
    for selector, labels in _selectors(promql.parse(query.text), frozenset()):
        found = [one for one in there if _matches(selector, one)]
        if not found:
            wrong.append(f"{query.panel}: nothing is {selector.prettify()}")
            continue
        wanting = labels - set.intersection(*(set(one.labels) for one in found))
        wrong += [f"{query.panel}: {selector.name} has no label {label}" for label in sorted(wanting)]
        grouped = set(labels) if grouped is None else grouped & labels
    # A legend shows only what the query still has.
    wrong += [f"{query.panel}: shows {label}" for label in sorted(query.shown - (grouped or query.shown))]
    return wrong


def metric_names(query: Query) -> set[str]:
    """Return the metrics that a query asks for."""
    return {selector.name for selector, _ in _selectors(promql.parse(query.text), frozenset())}


def _selectors(node: Any, labels: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yield every selector, with the labels by which what is around it groups."""
    if isinstance(node, promql.VectorSelector):
        yield node, labels
    elif isinstance(node, promql.MatrixSelector):
        yield from _selectors(node.vector_selector, labels)
    elif isinstance(node, promql.BinaryExpr):
        yield from _selectors(node.lhs, labels)
        yield from _selectors(node.rhs, labels)
    elif isinstance(node, promql.ParenExpr):
        yield from _selectors(node.expr, labels)
    elif isinstance(node, promql.AggregateExpr):
        yield from _selectors(node.expr, labels | set(node.modifier.labels if node.modifier else ()))
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _selectors(argument, labels)
    else:
        raise AssertionError(f"not looked into: {type(node)}")


def _matches(selector: Any, sample: Sample) -> bool:
    if sample.name != selector.name:
        return False
    for matcher in selector.matchers.matchers:
        value, op = sample.labels.get(matcher.name, ""), matcher.op
        is_same = (
            bool(re.fullmatch(matcher.value, value))
            if op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
            else value == matcher.value
        )
        if is_same == (op in (promql.MatchOp.NotEqual, promql.MatchOp.NotRe)):
            return False
    return True
