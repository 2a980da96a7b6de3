"""A server of the load test's own, as `make serve` starts it, with memory for a few adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

PATIENCE = 300.0  # seconds until it is ready


@contextmanager
def served(
    room: int | None, flags: Sequence[str], core: int | None = None, threads: int | None = None
) -> Iterator[str]:
    """Its address. Both tiers in memory have `room` bytes for adapters; None: what it takes by
    itself. With `core` it has that one alone."""
    with tempfile.TemporaryDirectory(prefix="nibble-load-") as home:
        log = Path(home) / "log"
        given = {
            "NIBBLE_HOME": home,
            "NIBBLE_PORT": "0",
            "NIBBLE_LOG_FORMAT": "json",
            "NIBBLE_ADAPTERS": "none",
        }
        if room is not None:
            given |= {"NIBBLE_SLOT_BYTES": str(room), "NIBBLE_HOST_CACHE_BYTES": str(room)}
        if threads is not None:
            given["OMP_NUM_THREADS"] = str(threads)
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*pinned, sys.executable, "-m", "service.cli", "serve", *flags],
                env={**os.environ, **given},
                stderr=output,
            )
        try:
            yield _ready(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + PATIENCE
    url = ""
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-2000:]}")
        url = url or _listening(log)
        if url and _answers(url):
            return url
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {PATIENCE:.0f} s")


def _listening(log: Path) -> str:
    for line in log.read_text().splitlines():
        if line.startswith("{") and (said := json.loads(line)).get("event") == "listening":
            return str(said["url"])
    return ""


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.HTTPError:
        return False
