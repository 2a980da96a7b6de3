"""The report as one HTML file: tables and plots, nothing fetched from anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from training.study.config import Metric, TaskConfig
from training.study.figures import COLOURS, PLAIN, Dot, Point, curves, dots, percent, scatter
from training.study.findings import Findings, Row
from training.study.markdown import markdown
from training.study.words import METRICS, arm_name, verdict_line

COSTS: Sequence[tuple[str, Callable[[Row], float | None], bool]] = (
    ("trained parameters", lambda row: row.parameters, True),
    ("peak memory, MiB", lambda row: row.peak_bytes and row.peak_bytes / 2**20, False),
    ("training time, s", lambda row: row.train_seconds, False),
)

SHORT = {"exact_match": "exact match", "accuracy": "accuracy", "nats": "nats a token"}

STYLE = (
    """
:root { --paper: #fff; --ink: #1c2127; --soft: #6a737d; --line: #dfe3e8; --mark: #b3261e;
  --s0: #2563eb; --s1: #c2410c; --s2: #15803d; --s3: #7c3aed; --s4: #be185d; --s5: #0e7490;
  --s6: #a16207; --s7: #4338ca; --s8: #65a30d; --s9: #9f1239; --s10: #0f766e; --s11: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e8eb; --soft: #98a1ab;
  --line: #2e343b; --mark: #ff8a80; --s0: #7aa7ff; --s1: #fb923c; --s2: #4ade80; --s3: #b794f6;
  --s4: #f472b6; --s5: #22d3ee; --s6: #facc15; --s7: #a5b4fc; --s8: #bef264; --s9: #fda4af;
  --s10: #5eead4; --s11: #9ca3af; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.verdict { border-left: 4px solid var(--s0); padding: .4rem .9rem; font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td:first-child { white-space: nowrap; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .title { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--mark); stroke-dasharray: 4 3; }
svg .front { fill: none; stroke: var(--soft); stroke-dasharray: 2 3; }
svg .curve { fill: none; stroke-width: 1.5; opacity: .85; }
svg .name { fill: var(--ink); }
"""
    + "\n".join(
        f"svg .s{i} :is(circle, rect, polygon) {{ fill: var(--s{i}); }} "
        f"svg .s{i} :is(line, polyline) {{ stroke: var(--s{i}); stroke-width: 2; }} "
        f"svg .s{i} .point {{ fill: var(--s{i}); }}"
        for i in range(COLOURS + 1)
    )
    + "\nsvg g .lead { stroke-width: 1; opacity: .6; }"
)


def page(findings: Findings, made: str) -> str:
    """The whole page."""
    study = findings.study
    body = _body(markdown(findings, made))
    for task in study.tasks:
        rows = [row for row in findings.rows if row.task == task.name]
        if rows:
            heading = f"<h2>{escape(task.name)}</h2>"
            body = body.replace(heading, heading + _plots(findings, task, rows), 1)
    verdict = escape(verdict_line(findings))
    body = body.replace(f"<p>{verdict}</p>", f'<p class="verdict">{verdict}</p>', 1)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(study.name)}</title><style>{STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _plots(findings: Findings, task: TaskConfig, rows: Sequence[Row]) -> str:
    series = _series(findings)
    label = _label(task.metric)
    marked = findings.verdict.over if findings.verdict else None
    found = [
        dots(
            f"{task.name}: {METRICS[task.metric]}",
            [
                Dot(
                    arm_name(row.name),
                    row.quality.value,
                    row.quality.low,
                    row.quality.high,
                    series[row.name],
                    row.name == marked,
                )
                for row in rows
            ],
            label,
        )
    ]
    trained = [row for row in rows if row.trained]
    trained = [row for row in rows if row.trained]
    lines = {row.name: row.curves for row in trained if row.curves}
    if lines:
        title = f"{task.name}: training loss in nats a token, a line for each seed"
        found.append(curves(title, lines, [series[name] for name in lines]))
    for name, cost, log in COSTS:
        points = [
            Point(row.name, float(x), row.quality.value, series[row.name])
            for row in trained
            if (x := cost(row))
        ]
        if points:
            up = task.metric != "nats"
            title = f"{task.name}: {SHORT[task.metric]} against {name.partition(',')[0]}"
            found.append(scatter(title, points, name, label, up=up, log=log))
    return f'<div class="plots">{"".join(found)}</div>'


def _series(findings: Findings) -> dict[str, int]:
    """Each arm's colour, the same in all plots."""
    methods = {m.label: i for i, m in enumerate(findings.study.methods)}
    return {**dict.fromkeys(findings.study.references, PLAIN), **methods}


def _label(metric: Metric) -> Callable[[float], str]:
    return (lambda value: f"{value:.4g}") if metric == "nats" else percent


def _body(text: str) -> str:
    """The Markdown that `training.study.markdown` writes, and no more of it, as HTML."""
    parts = []
    for block in text.strip().split("\n\n"):
        if block.startswith("|"):
            parts.append(_table(block))
        elif block.startswith("#"):
            marks, _, title = block.partition(" ")
            parts.append(f"<h{len(marks)}>{_inline(title)}</h{len(marks)}>")
        else:
            parts.append(f"<p>{_inline(block)}</p>")
    return "\n".join(parts)


def _table(block: str) -> str:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
    cells = [[_inline(cell.strip().replace("\\|", "|")) for cell in row] for row in lines]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    rows = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in cells[2:])
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _inline(text: str) -> str:
    found = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    found = re.sub(r"(?<!\w)\*(.+?)\*(?!\w)", r"<i>\1</i>", found)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", found)
