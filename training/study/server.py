"""A server of the study's own, started on the command line, so that the wings stay apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from base.mini import MINI
from training.errors import TrainingError
from training.study.config import StudyConfig

PATIENCE = 300.0  # seconds for the server to come up


def served_name(arm: str) -> str:
    """Names of adapters have no dots."""
    return arm.replace(".", "-").replace("+", "-").replace("_", "-")


@dataclass(frozen=True, slots=True)
class Running:
    """A server, and the directory in which it keeps everything."""

    client: httpx.Client
    home: Path


@contextmanager
def server(study: StudyConfig) -> Iterator[Running]:
    """A running server without samples, on a free port, with a store that is thrown away."""
    nibble = Path(sys.executable).with_name("nibble")
    if not nibble.is_file():
        raise TrainingError(f"{nibble} is not there: a study serves with the installed package")
    base = str(MINI) if study.base == "mini" else study.base
    with tempfile.TemporaryDirectory(prefix="nibble-study-") as home:
        port, log = _free_port(), Path(home) / "serve.log"
        command = [str(nibble), "serve", "--base", base, "--port", str(port), "--home", home]
        if study.double_quant is not None:
            command.append("--double-quant" if study.double_quant else "--no-double-quant")
        environment = {**os.environ, "OMP_NUM_THREADS": str(study.threads)}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as client:
                _wait(client, process, log)
                yield Running(client, Path(home))
        finally:
            process.terminate()
            process.wait(60)


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise TrainingError(f"no server came up for the study:\n{said}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
