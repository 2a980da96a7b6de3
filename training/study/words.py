"""The report's words: what an arm is called, how a quality, a size, a time is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from training.evaluation.significance import Estimate
from training.study.config import Metric, StudyConfig
from training.study.findings import Comparison, Findings, Row, figure

REFERENCES: Mapping[str, str] = {
    "zero_shot": "base, zero-shot",
    "few_shot": "base, few-shot",
    "gold_context": "base, gold context",
    "bm25": "base, BM25 passages",
    "template": "base, prompt template",
    "dense": "base, retrieval (dense)",
    "hybrid": "base, retrieval (hybrid)",
}
METRICS: Mapping[Metric, str] = {
    "exact_match": "exact match",
    "accuracy": "accuracy, by the likelihood of the choices",
    "nats": "nats for each token, less is better",
}
COLUMNS = (
    "arm",
    "quality",
    "95 % interval",
    "less few-shot",
    "p",
    "still known",
    "parameters",
    "file",
    "peak memory",
    "training",
    "tokens/s",
    "serving",
)


REQUEST_COLUMNS = (
    "arm",
    "quality",
    "95 % interval",
    "p against the first method",
    "prompt tokens",
    "answer tokens",
    "request",
    "prepared",
)


def request_cells(findings: Findings, row: Row) -> list[str]:
    """One row of what requests cost, by REQUEST_COLUMNS."""
    metric, cost = findings.study.task(row.task).metric, row.request or {}
    first = findings.study.methods[0].label
    mine = (
        c for c in findings.comparisons if (c.task, c.method, c.over) == (row.task, first, row.name)
    )
    against = next(mine, None)
    prepared = row.file_bytes if row.trained else cost["prepared_bytes"]
    return [
        arm_name(row.name),
        figure(metric, row.quality.value),
        interval(metric, row.quality),
        p_value(against.paired.p) if against else "–",
        f"{cost['prompt_tokens']:.0f}",
        f"{cost['answer_tokens']:.1f}",
        f"{cost['ms']:.0f} ms",
        size(prepared) if prepared else "nothing",
    ]


def arm_name(name: str) -> str:
    return REFERENCES.get(name, name)


def interval(metric: Metric, estimate: Estimate) -> str:
    return f"{figure(metric, estimate.low)} to {figure(metric, estimate.high)}"


def difference(metric: Metric, value: float) -> str:
    return f"{value:+.3f}" if metric == "nats" else f"{100 * value:+.1f} points"


def size(count: int | None) -> str:
    if count is None:
        return "–"
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def cells(findings: Findings, metric: Metric, row: Row) -> list[str]:
    """One row of a task's table, by COLUMNS."""
    against = _against(findings.comparisons, row)
    kept, seeds = row.retention, len(findings.study.seeds)
    few = f" ({row.seeds} of {seeds} seeds)" if row.trained and row.seeds < seeds else ""
    return [
        arm_name(row.name) + few,
        figure(metric, row.quality.value),
        interval(metric, row.quality),
        difference(metric, against.paired.difference.value) if against else "–",
        p_value(against.paired.p) if against else "–",
        f"{kept.value:.1%}" if kept else "–",
        f"{row.parameters:,}" if row.parameters is not None else "–",
        size(row.file_bytes),
        size(row.peak_bytes),
        f"{row.train_seconds:.0f} s" if row.train_seconds is not None else "–",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "–",
        f"{row.serving_ms:.2f} ms/token" if row.serving_ms is not None else "–",
    ]


def _against(comparisons: Sequence[Comparison], row: Row) -> Comparison | None:
    """The row's own test against few-shot, if there is one."""
    mine = (c for c in comparisons if (c.task, c.method) == (row.task, row.name))
    return next((c for c in mine if c.over == "few_shot"), None)


def verdict_line(findings: Findings) -> str:
    """The hypothesis, and what became of it."""
    said = findings.verdict
    if said is None:
        return "No hypothesis was written down."
    wins = sum(bool(won) for won in said.won.values())
    open_tasks = [task for task, won in said.won.items() if won is None]
    came = {True: "It holds", False: "It does not hold", None: "It is not decided"}[said.holds]
    luck = ""
    if said.at_chance:
        luck = (
            f" On {', '.join(said.at_chance)} the bound is not above chance, the share of the most "
            "frequent answer: whatever few-shot got there, nothing was learnt."
        )
    rest = f"; not run to the end: {', '.join(open_tasks)}" if open_tasks else ""
    return (
        f"Written down beforehand: {said.method}'s lower 95 % bound is above "
        f"{arm_name(said.over)} on at least {said.needed} of {len(said.won)} tasks. "
        f"{came}: {wins} of {len(said.won)}{rest}.{luck}"
    )


def budget_line(study: StudyConfig) -> str:
    rates = len(study.methods[0].learning_rates)
    each = "; ".join(
        f"{task.name} {task.tokens or study.tokens:,} tokens in batches of "
        f"{task.batch_size or study.batch_size}"
        for task in study.tasks
    )
    return (
        f"The budget of a trained arm: {each}; the same batches for every method. Each method gets "
        f"{rates} learning rate{'s' if rates > 1 else ''}, tried with seed {study.seeds[0]} and "
        "chosen by the loss on validation items, never on test items; the chosen rate runs with "
        f"the seeds {', '.join(map(str, study.seeds))}."
    )


def intervals_note() -> str:
    return (
        "Intervals resample seeds and test items 2,000 times (percentile bootstrap); of a rate of "
        "one run, or of 0 % or 100 %, they are Wilson's. *less "
        "few-shot* and its p compare the same items, a method's mean over its seeds, by the paired "
        "bootstrap. *still known* is exact match on held-out items of what the base was taught. "
        "*peak memory* is the arm's whole process, Python, torch and the base with it. Each arm "
        "ran in its own process, one after another."
    )
