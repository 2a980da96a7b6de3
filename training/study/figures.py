"""Plots as inline SVG: dots with intervals, scatters with their Pareto front, learning curves.

Plain functions of numbers; colours come from the page's style sheet by class, so that a page can
be read in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from training.study.labels import ASCENT, Label, labels

COLOURS = 11  # of the style sheet; arms beyond them have the same ones in another shape
PLAIN = -1  # a grey one, for what was not trained
SHAPES = 3
WIDTH, HEIGHT = 360, 250
LEGEND = 120  # beside the curves
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 40


@dataclass(frozen=True, slots=True)
class Dot:
    """A figure with its interval, under a name."""

    name: str
    value: float
    low: float
    high: float
    series: int
    mark: bool = False  # a line at its value, to compare the others with


@dataclass(frozen=True, slots=True)
class Point:
    """One arm in a scatter."""

    name: str
    x: float
    y: float
    series: int


class Scale:
    """Numbers to pixels, linear or by tens."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, log: bool = False
    ) -> None:
        self.log = log and min(values) > 0
        low, high = min(map(self._at, values)), max(map(self._at, values))
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        part = (self._at(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the scale."""
        if self.log:
            tens = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [f * 10.0**p for p in tens for f in (1, 2, 5)]
            inside = [v for v in found if self.low <= math.log10(v) <= self.high]
            return inside if len(inside) <= 6 else [v for v in inside if _leads_with_one(v)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [k * step for k in range(first, last + 1)]


def _leads_with_one(value: float) -> bool:
    return abs(math.log10(value) % 1) < 1e-9


def short(value: float) -> str:
    """1.2M, 34k, 0.05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def dots(title: str, rows: Sequence[Dot], label: Callable[[float], str]) -> str:
    """One line for each arm: its figure and its interval; a dashed line at the marked one."""
    height = TOP + 24 * len(rows) + BOTTOM
    left, width = 150, 620
    edges = [edge for row in rows for edge in (row.low, row.high, row.value)]
    x = Scale(edges, left, width - RIGHT)
    bottom = height - BOTTOM + 8
    parts = [_grid_x(x, label, TOP, bottom)]
    for row in rows:
        if row.mark:
            at = x(row.value)
            parts.append(
                f'<line class="mark" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>'
            )
    for index, row in enumerate(rows):
        y = TOP + 24 * index + 14
        tip = f"{row.name}: {label(row.value)} ({label(row.low)} to {label(row.high)})"
        parts.append(
            f'<g class="{_colour(row.series)}"><title>{escape(tip)}</title>'
            f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">'
            f"{escape(row.name)}</text>"
            f'<line x1="{x(row.low):.1f}" y1="{y}" x2="{x(row.high):.1f}" y2="{y}"/>'
            f"{_marker(row.series, x(row.value), y)}</g>"
        )
    return _svg(title, width, height, parts)


def scatter(
    title: str,
    points: Sequence[Point],
    x_name: str,
    y_label: Callable[[float], str],
    *,
    up: bool = True,
    log: bool = False,
) -> str:
    """Quality against a cost; the line is the Pareto front: nothing is both cheaper and better.

    `up`: more is better; otherwise the axis is turned, so that better is always above.
    """
    x = Scale([p.x for p in points], LEFT, WIDTH - RIGHT, log=log)
    ends = (HEIGHT - BOTTOM, TOP) if up else (TOP, HEIGHT - BOTTOM)
    y = Scale([p.y for p in points], *ends)
    parts = [_grid_x(x, short, TOP, HEIGHT - BOTTOM), _grid_y(y, y_label)]
    front = pareto([(p.x, p.y if up else -p.y) for p in points])
    line = " ".join(f"{x(points[i].x):.1f},{y(points[i].y):.1f}" for i in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    places = [(x(point.x), y(point.y)) for point in points]
    names = labels(places, [p.name for p in points], (LEFT, TOP - 2, WIDTH, HEIGHT - BOTTOM + 3))
    for point, (at, height), name in zip(points, places, names, strict=True):
        tip = f"{point.name}: {y_label(point.y)} at {short(point.x)}"
        lead = _lead((at, height), name) if name.far else ""
        parts.append(
            f'<g class="{_colour(point.series)}"><title>{escape(tip)}</title>{lead}'
            f"{_marker(point.series, at, height)}"
            f'<text class="point" x="{name.x:.1f}" y="{name.y:.1f}">{escape(point.name)}</text></g>'
        )
    parts.append(_below(x_name))
    return _svg(title, WIDTH, HEIGHT, parts)


def curves(
    title: str, lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], series: Sequence[int]
) -> str:
    """Loss against tokens: a line for each seed, in its method's colour; the method with the least
    loss at the end is named last, as its lines are the lowest."""
    every = [point for group in lines.values() for line in group for point in line]
    x = Scale([p[0] for p in every], LEFT, WIDTH - RIGHT)
    y = Scale([p[1] for p in every], HEIGHT - BOTTOM, TOP, log=True)
    parts = [_grid_x(x, short, TOP, HEIGHT - BOTTOM), _grid_y(y, short)]
    for (name, group), number in zip(lines.items(), series, strict=True):
        dash = _DASHES[number // COLOURS % SHAPES]
        for line in group:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
            parts.append(
                f'<g class="{_colour(number)}"><title>{escape(name)}</title>'
                f'<polyline class="curve"{dash} points="{path}"/></g>'
            )
    ends = {name: sum(line[-1][1] for line in group) / len(group) for name, group in lines.items()}
    numbers = dict(zip(lines, series, strict=True))
    named = sorted(ends, key=lambda name: -ends[name])
    row = min(15.0, (HEIGHT - TOP - 6) / max(1, len(named)))
    for index, name in enumerate(named):
        at = TOP + 8 + index * row
        parts.append(
            f'<g class="{_colour(numbers[name])}">{_marker(numbers[name], WIDTH + 4, at)}'
            f'<text class="point" x="{WIDTH + 14}" y="{at + 4:.1f}">{escape(name)}</text></g>'
        )
    parts.append(_below("tokens seen"))
    return _svg(title, WIDTH + LEGEND, HEIGHT, parts)


_DASHES = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')


def _lead(point: tuple[float, float], name: Label) -> str:
    """A line from a point to its name."""
    x, y = point
    end = min(max(x, name.x), name.x + name.width)
    edge = name.y - ASCENT if name.y > y else name.y + 2
    return f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{edge:.1f}"/>'


def _colour(series: int) -> str:
    """The class of an arm's colour."""
    return f"s{COLOURS if series == PLAIN else series % COLOURS}"


def _marker(series: int, x: float, y: float) -> str:
    """A disc; a square and a diamond for arms beyond the colours that there are."""
    shape = 0 if series == PLAIN else series // COLOURS % SHAPES
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    corners = ((0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0))
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}"/>'


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that none beats in both, cheapest (x) first; y is better above."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _grid_x(scale: Scale, label: Callable[[float], str], top: float, bottom: float) -> str:
    return "".join(
        f'<line class="grid" x1="{scale(v):.1f}" y1="{top}" x2="{scale(v):.1f}" y2="{bottom}"/>'
        f'<text class="tick" x="{scale(v):.1f}" y="{bottom + 14}" text-anchor="middle">'
        f"{escape(label(v))}</text>"
        for v in scale.ticks()
    )


def _grid_y(scale: Scale, label: Callable[[float], str]) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" y1="{scale(v):.1f}" x2="{WIDTH - RIGHT}" '
        f'y2="{scale(v):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{scale(v) + 4:.1f}" text-anchor="end">'
        f"{escape(label(v))}</text>"
        for v in scale.ticks()
    )


def _below(name: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(name)}</text>"
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f'<text class="title" x="12" y="16">{escape(title)}</text>{"".join(parts)}</svg>'
    )
