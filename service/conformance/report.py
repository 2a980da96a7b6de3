"""The matrix of kinds and checks, as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.conformance.recipes import ELSEWHERE
from service.conformance.result import BOUND, CHECKS, Cell, Cost, Row, worst

BEGIN = "<!-- conformance: written by `nibble conformance --update` -->"
END = "<!-- end of conformance -->"

_HEADS = {
    "isolation": "row alone",
    "peft": "PEFT",
    "reload": "reload",
    "merged": "merged",
    "zero": "start",
    "round_trip": "HTTP",
}


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "bound": BOUND,
        "checks": dict(CHECKS),
        "passed": not any(row.failed for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """One line for each kind; a cell is the worst of all bases, costs are those of the first."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)
    head = ["kind", "as", *_HEADS.values(), "bytes", "flops", "time"]
    lines = [_line(head), _line(["---"] * len(head))]
    for kind, own in by_kind.items():
        cells = [
            worst([r.cells[name] for r in own if name in r.cells] or [_MISSING]) for name in _HEADS
        ]
        cost = next((row.cost for row in own if row.cost), None)
        form = cost.form if cost else "refused"
        lines.append(_line([f"`{kind}`", form, *map(_cell, cells), *_costs(cost)]))
    return "\n".join(lines) + "\n"


_MISSING = Cell.nothing("an earlier check failed")


def legend(bases: Iterable[str]) -> str:
    """What the columns say."""
    meaning = "; ".join(f"*{_HEADS[name]}*: {what}" for name, what in CHECKS.items())
    return (
        f"On {', '.join(bases)}. {meaning}. A number is the largest difference of a logit over the "
        f"largest logit, at most {BOUND:g}; `=` is to the bit; – means that there is nothing to "
        "compare. *bytes*: of one adapter in its slot; *flops*: what it adds for a token, over "
        "what the base computes (by the registry, `adapters/methods.py`); *time*: CPU time of a "
        "step of 8 rows over the base's. All three on the first base, at rank 4 on every linear "
        "layer where a kind has ranks and targets.\n"
        + "".join(f"`{kind}` is no method of PEFT: {who}.\n" for kind, who in ELSEWHERE.items())
    )


def update(path: Path, rows: Sequence[Row]) -> None:
    """Write the table between the two marks of a Markdown file. Raises ValueError without them."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} has no place for the table: it wants one {BEGIN} before {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    bases = list(dict.fromkeys(row.base for row in rows))
    path.write_text(
        f"{before}{BEGIN}\n\n{table(rows)}\n{legend(bases)}\n{END}{after}", encoding="utf-8"
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    if cell.status == "none":
        return "–"
    if cell.status == "fail":
        return "**fails**"
    if cell.error is None:
        return "yes"
    return "=" if cell.error == 0 else f"{cell.error:.0e}"


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["–", "–", "–"]
    time = f"{cost.seconds_over_base:.2f}×" if cost.seconds_over_base else "–"
    return [f"{cost.bytes / 1024:,.0f} KiB", f"{100 * cost.flops_of_base:+.1f} %", time]
