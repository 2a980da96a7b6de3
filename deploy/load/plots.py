"""Two kinds of plot as SVG: bars, and the share of values below each value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = (
    *("#1f6f8b", "#d98e04", "#8c2f39", "#4a4e69", "#588157"),
    *("#c97b84", "#7fb7be", "#9a8c98", "#e76f51", "#264653"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 60, 200, 40, 40
BAR, LABELS = 22, 240


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    values: Sequence[float]


def bars(values: Sequence[tuple[str, float]], title: str) -> str:
    """A bar for each value, from zero, with a mark at 1."""
    most = max([value for _, value in values] + [1.0]) * 1.1
    height = TOP + (BAR + 6) * len(values) + 10

    def across(value: float) -> float:
        return LABELS + (WIDTH - LABELS - 80) * value / most

    parts = [_text(8, 22, title, weight="bold")]
    for number, (name, value) in enumerate(values):
        y = TOP + (BAR + 6) * number
        parts += [
            _text(LABELS - 8, y + 15, name, anchor="end"),
            f'<rect x="{LABELS}" y="{y}" width="{across(value) - LABELS:.1f}" height="{BAR}" '
            f'fill="{COLOURS[0]}"/>',
            _text(across(value) + 6, y + 15, f"{value:.2f}×"),
        ]
    mark = across(1.0)
    parts.append(_rule(mark, TOP - 4, mark, height - 8))
    return _svg(parts, height)


def lines(found: Sequence[Line], title: str) -> str:
    """For each line: which share of its values (up) is at most so large (across, logarithmic)."""
    values = [max(value, 1e-3) for line in found for value in line.values] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def across(value: float) -> float:
        share = (math.log10(max(value, 1e-3)) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def up(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_text(8, 22, title, weight="bold")]
    for share in (0.0, 0.5, 0.9, 0.99):
        parts += [_rule(LEFT, up(share), WIDTH - RIGHT, up(share))]
        parts.append(_text(LEFT - 6, up(share) + 4, f"{share:.0%}", anchor="end"))
    for power in range(low, high + 1):
        x = across(10.0**power)
        parts += [_rule(x, TOP, x, HEIGHT - BOTTOM)]
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{10.0**power:g}", anchor="middle"))
    for number, line in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        ordered = sorted(line.values)
        points = " ".join(
            f"{across(value):.1f},{up((place + 1) / len(ordered)):.1f}"
            for place, value in enumerate(ordered)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = TOP + 18 * number
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 16}" y="{y}" width="12" height="12" fill="{colour}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 34, y + 11, line.name))
    return _svg(parts, HEIGHT)


def _svg(parts: Sequence[str], height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _rule(x: float, y: float, to_x: float, to_y: float) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="#999999" '
        'stroke-width="0.5"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="12" '
        f'text-anchor="{anchor}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'
    )
