"""Computes the coordinates of line charts, histograms and interval bars.

The module is pure. The report's template draws them as inline SVG, so nothing here knows HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 26.0
_MAX_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """Describes a labeled position on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """Describes a curve.

    `path` is SVG path data; `dots` are its points (x, y), empty if there are more than 40.
    """

    name: str
    path: str
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """Describes lines over steps, with their axes, in SVG units."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: float | None  # x of the step whose weights were saved
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class Bar:
    """Describes one bin of a histogram, in SVG units, with its tooltip."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Interval:
    """Describes the confidence interval of a difference, on a scale that is centered on 0.

    All values are percentages of the width.
    """

    zero: float
    low: float
    high: float
    middle: float


def chart(series: Sequence[tuple[str, Sequence[Point]]], written: int | None) -> Chart | None:
    """Returns a chart of the named series, or None if there is nothing to draw.

    Values that aren't finite are left out. `written` is the step whose weights were saved.
    """
    finite = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    all_points = [point for _, points in finite for point in points]
    if not all_points:
        return None
    x_ticks = ticks(0.0, max(x for x, _ in all_points), 6)
    y_ticks = ticks(min(y for _, y in all_points), max(y for _, y in all_points), 5)
    x0, x1 = 0.0, max(max(x for x, _ in all_points), 1.0)
    y0 = min(y_ticks[0], min(y for _, y in all_points))
    y1 = max(y_ticks[-1], max(y for _, y in all_points))

    def across(x: float) -> float:
        """Returns the SVG x of a step."""
        return round(_LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        """Returns the SVG y of a value."""
        return round(HEIGHT - _BOTTOM - (y - y0) / ((y1 - y0) or 1.0) * (HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for name, points in finite:
        scaled = [(across(x), down(y)) for x, y in thinned(points)]
        path = " ".join(f"{'M' if not index else 'L'}{x:g} {y:g}" for index, (x, y) in enumerate(scaled))
        lines.append(Line(name, path, tuple(scaled) if len(scaled) <= 40 else ()))
    return Chart(
        tuple(lines),
        tuple(Tick(across(x), f"{x:,.0f}") for x in x_ticks if x <= x1),
        tuple(Tick(down(y), f"{y:g}") for y in y_ticks if y0 <= y <= y1),
        across(written) if written is not None and x0 <= written <= x1 else None,
    )


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Returns an exponential moving average over about this share of the points."""
    decay = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    means = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = total * decay + y, weight * decay + 1
            means.append((x, total / weight))
    return means


def thinned(points: Sequence[Point]) -> list[Point]:
    """Returns at most 400 points, so that a page stays small.

    Groups of neighbors are replaced by their mean; the first and the last point stay.
    """
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means[1:-1], points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers that cover the range from `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 12) for index in range(first, last + 1)]


def bars(edges: Sequence[int], counts: Sequence[int], width: float = 320.0, height: float = 90.0) -> tuple[Bar, ...]:
    """Returns the bars of a histogram, all of the same width; empty if all counts are 0."""
    highest = max(counts, default=0)
    if not highest:
        return ()
    bin_width = width / len(counts)
    return tuple(
        Bar(
            round(index * bin_width + 0.5, 2),
            round(height - height * count / highest, 2),
            round(bin_width - 1, 2),
            round(height * count / highest, 2),
            f"{edges[index]} to {edges[index + 1]}: {count}" if index + 1 < len(edges) else str(count),
        )
        for index, count in enumerate(counts)
    )


def interval(low: float, high: float, middle: float) -> Interval:
    """Scales a confidence interval and its middle to percent of the width."""
    reach = max(abs(low), abs(high), abs(middle)) * 1.15 or 1.0

    def at(value: float) -> float:
        """Returns the position of a value in percent of the width."""
        return round(50 + 50 * value / reach, 2)

    return Interval(50.0, at(low), at(high), at(middle))
