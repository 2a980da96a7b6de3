"""A bar chart as SVG: one group of bars for each scenario, one colour for each peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#1f6f8b", "#7fb7be", "#b0b0b0", "#d98e04", "#8c2f39", "#c97b84", "#4a4e69")
WIDTH, LABELS, RIGHT = 860, 330, 60
BAR, GAP, TOP = 15, 14, 44
_FONT = 'font-family="sans-serif" font-size="12"'


def bar_chart(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """A bar for each row of the report, its length the tokens/s of the best of its scenario = full.

    Each scenario has a scale of its own, since 8 requests and a prompt differ by tens.
    """
    who = list(dict.fromkeys(f"{row['peer']}: {row['way']}" for row in rows))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(who)}
    parts, y = [], TOP
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == scenario]
        most = max(row["tokens_per_second"] for row in mine)
        unit = "prompt tokens/s" if mine[0]["counts"] == "prompt" else "tokens/s"
        parts.append(_text(8, y + 11, f"{scenario} ({unit})", weight="bold"))
        y += BAR + 4
        for row in mine:
            name = f"{row['peer']}: {row['way']}"
            parts += _bar(y, name, row["tokens_per_second"], most, colours[name])
            y += BAR + 2
        y += GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" role="img">'
    )
    ground = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, ground, _text(8, 22, title, weight="bold"), *parts, "</svg>", ""])


def _bar(y: int, name: str, value: float, most: float, colour: str) -> list[str]:
    length = round((WIDTH - LABELS - RIGHT) * value / most, 1) if most else 0.0
    return [
        _text(LABELS - 8, y + 11, name, anchor="end"),
        f'<rect x="{LABELS}" y="{y}" width="{length}" height="{BAR}" fill="{colour}"/>',
        _text(LABELS + length + 5, y + 11, f"{value:,.1f}"),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" {_FONT} text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#222222">{escape(text)}</text>'
    )
