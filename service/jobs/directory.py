"""A job's directory: links to its files, its config, and what its run writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from service.jobs.files import TrainingFiles
from service.jobs.order import TEMPLATE, TRAINING, VALIDATION, FileStamp, Order, run_config
from service.jobs.progress import RUN

CONFIG = "job.json"  # JSON is YAML


def prepare(
    order: Order,
    directory: Path,
    files: TrainingFiles,
    base: str,
    double_quant: bool | None = None,
) -> None:
    """The job's directory: links to its files, which outlive the files' deletion, and its config.

    Raises OSError where a file is not there.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if order.template is not None:
        _write(directory / TEMPLATE, order.template.definition)
    for name, stamp in ((TRAINING, order.training), (VALIDATION, order.validation)):
        if stamp is not None:
            link(stamp, directory / (name + stamp.suffix), files)
    write_config(directory, run_config(order, base, double_quant))


def link(stamp: FileStamp, to: Path, files: TrainingFiles) -> None:
    """One file into a job's directory, once."""
    if not to.exists():
        to.hardlink_to(files.path(files.get(stamp.id)))


def drop_data(directory: Path) -> None:
    """Let go of what only a run needs, of a job that will not run again: its links are the last of
    files that were deleted."""
    for pattern in (f"{TRAINING}.*", f"{VALIDATION}.*", f"{RUN}/checkpoint.safetensors"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def write_config(directory: Path, config: Any) -> None:
    _write(directory / CONFIG, json.dumps(config, ensure_ascii=False, indent=1))


def _write(path: Path, text: str) -> None:
    """Whole, or not at all."""
    written = path.with_name(f"{path.name}.tmp")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
