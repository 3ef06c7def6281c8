"""Curves of metrics over steps, as points of small SVGs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST = 6
"""Charts on a page."""
FIRST = ("loss", "cider_d", "spider", "fense", "exact_match", "rouge_l", "repetition_rate", "discrimination")
"""Metrics that are drawn before all others."""
WIDTH, HEIGHT = 200, 88
"""Of the plot, in units of its own."""


@dataclass(frozen=True)
class Line:
    """A curve. series: its number among the sources, 0 for all together; points: as SVG writes them."""

    name: str
    series: int
    points: list[tuple[float, float]]
    words: str
    """First and last value, for those who do not see it."""

    @property
    def path(self) -> str:
        """As the attribute `points` of a polyline."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """The curves of a metric, and where its axes end."""

    metric: str
    lines: list[Line]
    low: float
    high: float
    first: int
    last: int


def charts(
    evaluated: Mapping[int, Mapping[str, Mapping[str, float]]], sources: Sequence[str], best: str
) -> list[Chart]:
    """Of the loss, the metric that marks the best checkpoint, and others, as far as there is room. evaluated:
    by step, metric and source; sources: the first stands for all together."""
    steps = sorted(evaluated)
    known = list(dict.fromkeys(metric for step in steps for metric in evaluated[step]))
    order = [metric for metric in dict.fromkeys(["loss", best, *FIRST, *known]) if metric in known]
    drawn = []
    for metric in order:
        values = {
            source: [(step, evaluated[step].get(metric, {}).get(source, math.nan)) for step in steps]
            for source in sources
        }
        drawn += _chart(metric, values)
    return drawn[:MOST]


def _chart(metric: str, values: Mapping[str, list[tuple[int, float]]]) -> list[Chart]:
    """A chart, if there is a curve to draw. values: steps and values by source."""
    finite = {
        (number, source): points
        for number, (source, told) in enumerate(values.items())
        if len(points := [point for point in told if math.isfinite(point[1])]) > 1
    }
    if not finite:
        return []
    steps, numbers = zip(*(point for points in finite.values() for point in points), strict=True)
    first, last, low, high = min(steps), max(steps), min(numbers), max(numbers)
    lines = []
    for (number, source), points in finite.items():
        places = [
            (
                round((step - first) / (last - first) * WIDTH, 1),
                round((1 - (value - low) / ((high - low) or 1)) * HEIGHT, 1),
            )
            for step, value in points
        ]
        words = f"{source or 'all'}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last"
        lines.append(Line(source, number, places, words))
    return [Chart(metric, lines[::-1], low, high, first, last)]
