"""Every block of the README, the tutorial and the how-tos is run, in order, against one server.

A page is read from top to bottom, as a reader would; what a block shows below itself must come out.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.blocks import PAGES, ROOT, Block, blocks, said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
START, BLOCK = 300, 1500  # seconds that a server may take to start, and one block to end
# What a test cannot do, by the beginning of a line; each must be there, or it is a leftover.
NOT_HERE = {
    "make ": "what calls this test, or the server that it has started",
    ".venv/bin/pip install": "needs an index",
    ".venv/bin/nibble compare": "a study takes hours",
    ".venv/bin/nibble bench": "minutes, on a quiet machine; tests/service/plan runs what follows",
    ".venv/bin/nibble serve": "the test has a server",
    ".venv/bin/accelerate launch": "tests/training/test_distributed.py runs it",
    "pytest -m cuda": "needs a GPU",
    "docker ": "needs a daemon",
    "kubectl ": "needs a cluster; tests/deploy checks what it renders",
}
ALL = [block for page in PAGES for block in blocks(page)]


def reason(block: Block) -> str | None:
    lines = [line for line in block.code.splitlines() if line and not line.startswith("#")]
    first = lines[0] if lines else ""
    return next((why for start, why in NOT_HERE.items() if first.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as a checkout's root, in which blocks may write."""
    where = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "docs", where / "docs", ignore=shutil.ignore_patterns("adapters"))
    shutil.copytree(ROOT / "deploy", where / "deploy")
    shutil.copytree(ROOT / "training" / "samples", where / "training" / "samples")
    programs = where / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("nibble", "python"):
        (programs / name).write_text(
            f'#!/bin/sh\nexec "{Path(sys.executable).parent}/{name}" "$@"\n'
        )
        (programs / name).chmod(0o755)
    return where


@pytest.fixture(scope="module")
def server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server as `make serve` starts it, on a free port, with a home of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server")
    environment = os.environ | {"NIBBLE_HOME": str(log / "home")}
    command = [str(place / ".venv/bin/nibble"), "serve", "--port", str(port)]
    with (log / "log").open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        for _ in range(START * 2):
            assert process.poll() is None, (log / "log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail("the server does not start:\n" + (log / "log").read_text())
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_block(block: Block, place: Path, server: str) -> None:
    if why := reason(block):
        pytest.skip(why)
    code = re.sub(r"(localhost|127\.0\.0\.1):8080", server, block.code)
    command = ["bash", "-euo", "pipefail", "-c", code]
    if block.language == "python":
        command = [sys.executable, "-c", code]
    environment = os.environ | {
        "NIBBLE_URL": f"http://{server}",
        "NIBBLE_HOME": str(place / "home"),
        "NIBBLE_PORT": server.rpartition(":")[2],
        "COLUMNS": "200",
    }
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=BLOCK
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    # curl ends with 0 whatever the server says.
    assert '"error_type"' not in done.stdout, done.stdout
    if block.shown is not None:
        assert said(done.stdout) == said(block.shown)


def test_nothing_is_skipped_that_is_not_there() -> None:
    lines = [line for block in ALL for line in block.code.splitlines()]
    for start in NOT_HERE:
        assert any(line.startswith(start) for line in lines), f"no block has {start!r}"
