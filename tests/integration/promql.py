"""Whether a query of a dashboard or an alert finds what is exposed: names, labels, and values of labels.

A parser says what a query reads; this says what it then has in hand, label by label, as Prometheus would.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import promql_parser as promql
from prometheus_client.samples import Sample

__all__ = ["Exposed", "WrongQueryError", "filled_in"]

_OF_PROMETHEUS: Final = frozenset({"instance", "job"})
"""The labels that Prometheus itself gives to what it scrapes."""

_VARIABLES: Final = {"$__rate_interval": "5m", "$instance": ".*", "$agent": ".*"}

Labels = frozenset[str]


class WrongQueryError(Exception):
    """A query that finds nothing, or not what it says."""


def filled_in(query: str) -> str:
    """Return a query of a dashboard as Grafana asks it when everything is chosen."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    if "$" in query:
        raise WrongQueryError(f"a variable is left in {query}")
    return query


@dataclass(frozen=True)
class Exposed:
    """What a page of metrics shows: the values that each label of each series has."""

    series: dict[str, dict[str, set[str]]]

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Exposed:
        found: dict[str, dict[str, set[str]]] = {"up": {}}
        for one in samples:
            labels = found.setdefault(one.name, {})
            for name, value in one.labels.items():
                labels.setdefault(name, set()).add(value)
        return cls(found)

    def labels_of(self, query: str) -> Labels:
        """Return the labels of what ``query`` finds.

        Raises:
            WrongQueryError: it is no PromQL, or reads a series, a label or a value that there is not.

        """
        try:
            parsed = promql.parse(query)
        except ValueError as error:
            raise WrongQueryError(f"{error}: {query}") from error
        return self._labels(parsed) or frozenset()

    def _labels(self, expr: Any) -> Labels | None:
        """Return the labels of a vector; ``None`` of a scalar."""
        match expr:
            case promql.VectorSelector():
                return self._selected(expr)
            case promql.MatrixSelector():
                return self._selected(expr.vector_selector)
            case promql.Call():
                return self._called(expr)
            case promql.AggregateExpr():
                return self._aggregated(expr)
            case promql.BinaryExpr():
                return self._joined(expr)
        inner = getattr(expr, "expr", None)  # of parentheses, a sign or a subquery
        return None if inner is None else self._labels(inner)

    def _selected(self, selector: Any) -> Labels:
        name = selector.name
        if name not in self.series:
            raise WrongQueryError(f"nothing exposes {name}")
        values = self.series[name]
        for matcher in selector.matchers.matchers:
            if matcher.name in _OF_PROMETHEUS:
                continue
            if matcher.name not in values:
                raise WrongQueryError(f"{name} has no label {matcher.name}")
            for wanted in _wanted(matcher):
                if not any(re.fullmatch(wanted, value) for value in values[matcher.name]):
                    known = sorted(values[matcher.name])
                    raise WrongQueryError(f"{matcher.name} of {name} is never {wanted}, but one of {known}")
        return frozenset(values) | _OF_PROMETHEUS | ({"agent"} if name == "up" else frozenset())

    def _called(self, call: Any) -> Labels | None:
        labels = [self._labels(one) for one in call.args]
        if call.func.name == "histogram_quantile":
            vector = labels[1]
            if vector is None or "le" not in vector:
                raise WrongQueryError("histogram_quantile needs the label le")
            return vector - {"le"}
        return frozenset() if call.func.name == "vector" else labels[0]

    def _aggregated(self, expr: Any) -> Labels:
        inner = self._labels(expr.expr)
        if inner is None:
            raise WrongQueryError("a scalar is aggregated")
        modifier = expr.modifier
        named = frozenset() if modifier is None else frozenset(modifier.labels)
        if not named <= inner:
            raise WrongQueryError(f"it is aggregated by {sorted(named - inner)}, which it has not")
        if str(expr.op) in {"topk", "bottomk"}:
            return inner
        return inner - named if modifier is not None and "Without" in str(modifier.type) else named

    def _joined(self, expr: Any) -> Labels | None:
        left, right = self._labels(expr.lhs), self._labels(expr.rhs)
        if left is None or right is None:
            return right if left is None else left
        if str(expr.op) == "or":
            return left | right
        matching = None if expr.modifier is None else expr.modifier.matching
        if matching is None:
            if left != right:
                raise WrongQueryError(f"{sorted(left)} and {sorted(right)} never match")
        elif not frozenset(matching.labels) <= left & right:
            raise WrongQueryError(f"not both sides have {sorted(matching.labels)}")
        return left


def _wanted(matcher: Any) -> Iterator[str]:
    """Return as expressions what a matcher looks for; each alternative by itself, or a misspelt one would pass."""
    if matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe):
        yield from matcher.value.split("|")
    else:
        yield re.escape(matcher.value)
