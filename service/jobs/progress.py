"""What a run's log tells: its steps, its checkpoints, how it ended. No torch here.

The log is the contract between the wings, two files of JSON lines in the run's directory
(training/run_directory.py): log.jsonl, a line for each step, in order, and events.jsonl, a line
for each thing that happened. A line that is still being written is left for the next look.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.jobs.order import OUT

RUN = Path(OUT) / "run"  # in a job's directory
TAIL_BYTES = 4096
LOG, HAPPENED = "log.jsonl", "events.jsonl"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run; times in seconds since the epoch."""

    number: int
    time: float
    loss: float | None  # None where it is no number any more
    learning_rate: float
    tokens: int  # of the run so far
    eval_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Happened:
    """A thing that happened: prepared, started, checkpoint, finished or refused."""

    what: str
    time: float
    data: dict[str, Any]


def steps(job_directory: Path, after: int = 0) -> list[Step]:
    """The steps with numbers above `after`, in order; a step that was run again counts once."""
    taken = (_step(line) for line in _lines(job_directory / RUN / LOG))
    found = {step.number: step for step in taken if step is not None and step.number > after}
    return [found[number] for number in sorted(found)]


def latest(job_directory: Path) -> Step | None:
    """The last step, without reading the whole log."""
    path = job_directory / RUN / LOG
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    found = [step for line in lines if (step := _step(line)) is not None]
    return found[-1] if found else None


def happened(job_directory: Path, what: str | None = None) -> list[Happened]:
    """What happened, in order; all of it or one sort."""
    found = []
    for text in _lines(job_directory / RUN / HAPPENED):
        line = _object(text)
        if line is not None:
            found.append(Happened(line.pop("event"), float(line.pop("time")), line))
    return [one for one in found if what in (None, one.what)]


def _step(text: str) -> Step | None:
    line = _object(text)
    if line is None:
        return None
    return Step(
        line["number"],
        float(line.get("time", 0.0)),
        _finite(line["loss"]),
        line["learning_rate"],
        line["tokens"],
        _finite(line.get("eval_loss")),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _object(text: str) -> dict[str, Any] | None:
    """The object of a whole line; None for one that is still being written, or that a kill tore."""
    try:
        line = json.loads(text) if text.endswith("\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
