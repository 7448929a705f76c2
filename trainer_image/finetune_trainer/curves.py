"""Numbers → the coordinates of a line chart, a histogram and an interval bar. Pure; drawn by the report's template as
inline SVG, so nothing here knows HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 26.0
_MOST_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """`path` is SVG path data; `dots` are (x, y) of its points where there are few enough to be seen."""

    name: str
    path: str
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: float | None  # where the written step is
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Interval:
    """Of a difference, on a scale of its own that holds 0. All in percent of the width."""

    zero: float
    low: float
    high: float
    middle: float


def chart(series: Sequence[tuple[str, Sequence[Point]]], written: int | None) -> Chart | None:
    """Lines over steps; what isn't finite is left out. None where there is nothing to draw."""
    kept = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    every = [point for _, points in kept for point in points]
    if not every:
        return None
    x_ticks = ticks(0.0, max(x for x, _ in every), 6)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 5)
    x0, x1 = 0.0, max(max(x for x, _ in every), 1.0)
    y0, y1 = min(y_ticks[0], min(y for _, y in every)), max(y_ticks[-1], max(y for _, y in every))

    def across(x: float) -> float:
        return round(_LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - y0) / ((y1 - y0) or 1.0) * (HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for name, points in kept:
        placed = [(across(x), down(y)) for x, y in thinned(points)]
        path = " ".join(f"{'M' if not index else 'L'}{x:g} {y:g}" for index, (x, y) in enumerate(placed))
        lines.append(Line(name, path, tuple(placed) if len(placed) <= 40 else ()))
    return Chart(
        tuple(lines),
        tuple(Tick(across(x), f"{x:,.0f}") for x in x_ticks if x <= x1),
        tuple(Tick(down(y), f"{y:g}") for y in y_ticks if y0 <= y <= y1),
        across(written) if written is not None and x0 <= written <= x1 else None,
    )


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """A running mean that forgets, over about this share of the points."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    found = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = total * keep + y, weight * keep + 1
            found.append((x, total / weight))
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many that a page stays small: of neighbours their mean; the first and last stay."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means[1:-1], points[-1]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from below low to above high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 12) for index in range(first, last + 1)]


def bars(edges: Sequence[int], counts: Sequence[int], width: float = 320.0, height: float = 90.0) -> tuple[Bar, ...]:
    """A histogram; every bin is as wide as any other."""
    most = max(counts, default=0)
    if not most:
        return ()
    each = width / len(counts)
    return tuple(
        Bar(
            round(index * each + 0.5, 2),
            round(height - height * count / most, 2),
            round(each - 1, 2),
            round(height * count / most, 2),
            f"{edges[index]} to {edges[index + 1]}: {count}" if index + 1 < len(edges) else str(count),
        )
        for index, count in enumerate(counts)
    )


def interval(low: float, high: float, middle: float) -> Interval:
    reach = max(abs(low), abs(high), abs(middle)) * 1.15 or 1.0

    def at(value: float) -> float:
        return round(50 + 50 * value / reach, 2)

    return Interval(50.0, at(low), at(high), at(middle))
