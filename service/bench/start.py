"""Starts of `nibble serve`, and what it then holds: time until /ready, resident memory, peaks.

The first start finds nothing kept, so it reads the checkpoint and quantises; the others map what
the first has left, and open its catalog. Each is a new process, its files in the page cache as
after any recent start.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.bench.launch import nibble_server
from service.bench.memory import Memory, resident
from service.bench.scenario import Job
from service.bench.server_peers import ask_completions

START = "start and memory"  # the name of this part, for --only
SECOND_STARTS = 3
SLACK = 250_000_000  # bytes that a server may take beside its weights and caches
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Held:
    """One start: seconds until /ready, and the process after its first request."""

    seconds: float
    memory: Memory


def measure_starts(model: Path, precision: str, threads: int, ask: Job) -> Figures:
    """The first start of a base, and the median of `SECOND_STARTS` more."""
    with tempfile.TemporaryDirectory(prefix="nibble-start-") as scratch:
        environment = {"NIBBLE_HOME": f"{scratch}/cache", "OMP_NUM_THREADS": str(threads)}
        home = Path(scratch) / "home"
        home.mkdir()
        first, *later = (
            _start(model, home, precision, environment, ask) for _ in range(1 + SECOND_STARTS)
        )
    seconds = [one.seconds for one in later]
    last = later[-1].memory
    return {
        "precision": precision,
        "first_seconds": round(first.seconds, 2),
        "second_seconds": round(statistics.median(seconds), 2),
        "second_seconds_all": [round(each, 2) for each in seconds],
        "first_peak_bytes": first.memory.peak_rss,
        "rss_bytes": last.rss,
        "anonymous_bytes": last.anonymous,
        "shard_bytes": max(file.stat().st_size for file in model.glob("*.safetensors")),
    }


def floor_seconds() -> float:
    """`import torch` alone, all of it, in a new process: the best of three."""
    return round(min(_import_torch() for _ in range(3)), 2)


def budget(memory: Mapping[str, int], kv_bytes: int) -> int:
    """What a server may hold: NF4 x 1.15, embeddings, the keys and values in use, and SLACK."""
    return round(1.15 * memory["nf4_bytes"]) + memory["embedding_bytes"] + kv_bytes + SLACK


def _start(
    model: Path, home: Path, precision: str, environment: Mapping[str, str], ask: Job
) -> Held:
    with nibble_server(model, home, ["--precision", precision], environment) as running:
        ask_completions(running.url, ask)
        return Held(running.seconds, resident(running.pid))


def _import_torch() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began
