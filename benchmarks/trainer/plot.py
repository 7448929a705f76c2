"""Draws curves as SVG. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_COLORS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8a5a44")
_DASHES = ("none", "6 4", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 380, 64, 40, 20, 44


def lines(curves: Mapping[str, Sequence[float]], title: str, across: str, up: str) -> str:
    """Returns an SVG with one line per curve, at x = 1, 2, …

    Later curves are dashed, so that equal ones are both visible. `across` and `up` are the labels
    of the axes.
    """
    values = [value for curve in curves.values() for value in curve]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    count = max(2, *(len(curve) for curve in curves.values()))

    def x(index: float) -> float:
        return _LEFT + index / (count - 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / span * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}">{escape(across)}</text>',
        f'<text x="14" y="{_TOP - 8}">{escape(up)}</text>',
    ]
    for tick in range(5):
        value = low + span * tick / 4
        at = f"{y(value):.1f}"
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 8}" y="{at}" text-anchor="end">{value:.3f}</text>',
        ]
    parts += [
        f'<text x="{x(step):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{step + 1}</text>'
        for step in sorted({0, (count - 1) // 2, count - 1})
    ]
    for index, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(curve))
        style = f'stroke="{_COLORS[index % 4]}" stroke-width="2" stroke-dasharray="{_DASHES[index % 4]}"'
        legend, at = _WIDTH - _RIGHT - 130, f"{18 + 16 * index}"
        parts += [
            f'<polyline points="{points}" fill="none" {style}/>',
            f'<line x1="{legend}" x2="{legend + 30}" y1="{at}" y2="{at}" {style}/>',
            f'<text x="{legend + 38}" y="{at}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
