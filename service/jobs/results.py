"""The metrics of a job's steps as a file that its client can fetch: CSV, a line for each step."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

from service.jobs import progress
from service.jobs.files import TrainingFiles
from service.jobs.job import Job

PURPOSE = "fine-tune-results"
COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "tokens")


def step_metrics(job: Job, directory: Path, files: TrainingFiles) -> str:
    """The id of the file. Raises StoreFull, StoreUnavailable, OSError."""
    path = directory / "step_metrics.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for step in progress.steps(directory):
            valid = "" if step.eval_loss is None else step.eval_loss
            rows.writerow((step.number, step.loss, valid, step.learning_rate, step.tokens))
        file.flush()
        os.fsync(file.fileno())
    raw = path.read_bytes()
    found = files.of(job.tenant).add(
        path,
        filename=f"{job.id}-step_metrics.csv",
        purpose=PURPOSE,
        suffix=".csv",
        nbytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    return found.id
