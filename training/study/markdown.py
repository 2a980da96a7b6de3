"""The report as one Markdown page of tables."""

from __future__ import annotations

from collections.abc import Sequence

from training.study.findings import Findings, Row, figure
from training.study.words import (
    COLUMNS,
    METRICS,
    REQUEST_COLUMNS,
    arm_name,
    budget_line,
    cells,
    intervals_note,
    request_cells,
    verdict_line,
)


def markdown(findings: Findings, made: str) -> str:
    """`made` says by which command, where and when."""
    study = findings.study
    parts = [f"# {study.name}", verdict_line(findings), budget_line(study), made]
    if findings.missing:
        parts.append(
            f"**Not complete**: {len(findings.missing)} arms that are known have not run; the same "
            "command goes on with them."
        )
    for task in study.tasks:
        rows = [row for row in findings.rows if row.task == task.name]
        if rows:
            shown = [cells(findings, task.metric, row) for row in rows]
            many = f"{rows[0].items:,} test items; {METRICS[task.metric]}."
            parts += [f"## {task.name}", many, table(COLUMNS, shown), *_requests(findings, rows)]
    parts.append(intervals_note())
    parts += _controls(findings) + _transfer(findings) + _trials(findings)
    if findings.refused:
        listed = [[name, why] for name, why in findings.refused.items()]
        parts += ["## Refused", table(("arm", "why"), listed)]
    return "\n\n".join(parts) + "\n"


def _requests(findings: Findings, rows: Sequence[Row]) -> list[str]:
    """What a request costs in each way, beside its quality."""
    asked = [row for row in rows if row.request]
    if not asked:
        return []
    many = f"One request of {asked[0].task}, the median of {(asked[0].request or {})['questions']}"
    shown = [request_cells(findings, row) for row in asked]
    return [f"{many}, one at a time on this machine:", table(REQUEST_COLUMNS, shown)]


def _controls(findings: Findings) -> list[str]:
    if not findings.controls:
        return []
    said = {True: "passed", False: "**failed**", None: "–"}
    rows = [[c.name, c.task, c.expected, c.found, said[c.passed]] for c in findings.controls]
    heads = ("control", "task", "expected", "found", "")
    return ["## Controls that could prove it wrong", table(heads, rows)]


def _transfer(findings: Findings) -> list[str]:
    """The matrix of adapters and tasks."""
    if not findings.transfer:
        return []
    tasks = [task.name for task in findings.study.tasks]
    rows = []
    for own in tasks:
        row = [own]
        for asked in tasks:
            found = findings.transfer.get((own, asked))
            metric = findings.study.task(asked).metric
            shown = "–" if found is None else figure(metric, found)
            row.append(f"**{shown}**" if own == asked else shown)
        rows.append(row)
    plain = ["(base alone)"]
    for asked in tasks:
        found_row = findings.of(asked, "zero_shot")
        metric = findings.study.task(asked).metric
        plain.append("–" if found_row is None else figure(metric, found_row.quality.value))
    return ["## Adapter of a row, asked the task of a column", table(("", *tasks), [*rows, plain])]


def _trials(findings: Findings) -> list[str]:
    if not findings.trials:
        return []
    rows = []
    for (task, name), tried in findings.trials.items():
        shown = [
            f"{rate:g}: {loss:.4f}" if isinstance(loss, float) else f"{rate:g}: refused"
            for rate, loss in tried.items()
        ]
        chosen = findings.of(task, name)
        rate = f"{chosen.learning_rate:g}" if chosen and chosen.learning_rate else "–"
        rows.append([task, arm_name(name), "; ".join(shown), rate])
    heads = ("task", "method", "validation nats by learning rate", "chosen")
    return ["## Trials", table(heads, rows)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str]) -> str:
        escaped = [cell.replace("|", r"\|") for cell in row]
        return f"| {' | '.join(escaped)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
