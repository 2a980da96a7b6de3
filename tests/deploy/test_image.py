"""The Dockerfile, read: `make test-image` builds and runs it, which takes root and ten minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.deploy.manifests import ROOT

Step = tuple[str, str]  # an instruction and its text


def stages() -> dict[str, tuple[str, list[Step]]]:
    """By name: what each is built on, and its steps."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    found: dict[str, tuple[str, list[Step]]] = {}
    steps: list[Step] = []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            steps = []
            found[name] = (base, steps)
        else:
            steps.append((word, rest.strip()))
    return found


def whole(name: str) -> list[Step]:
    """A stage's steps after those of what it is built on."""
    base, steps = stages()[name]
    return [*(whole(base) if base in stages() else []), *steps]


def test_stages_stand_on_each_other() -> None:
    known = stages()
    assert list(known) == ["build", "runtime", "cuda", "cpu"], "the last is what a build makes"
    for base, steps in known.values():
        assert base == "${BASE}" or base in known
        for word, text in steps:
            if word == "COPY" and text.startswith("--from="):
                assert text.split()[0].removeprefix("--from=") in known


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_both_variants_are_locked_down(name: str) -> None:
    steps = whole(name)
    last = dict(steps)
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["nibble"]
    assert json.loads(last["CMD"]) == ["serve"]
    probe = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert probe[:2] == ["python", "-c"]
    compile(probe[2], "HEALTHCHECK", "exec")
    variables = " ".join(text for word, text in steps if word == "ENV")
    assert {"NIBBLE_HOME=/data", "HOME=/data"} <= set(variables.split())
    assert [text for word, text in steps if word == "COPY"] == [
        "--from=build /opt/nibble /opt/nibble"
    ], "no sources and no compiler's leftovers"


def test_every_command_is_one_for_the_shell_and_every_version_is_pinned() -> None:
    for _, steps in stages().values():
        for word, text in steps:
            if word != "RUN":
                continue
            done = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "pip install" not in text or "-c constraints.txt" in text
            assert "apt-get install" not in text or "--no-install-recommends" in text


def test_the_healthcheck_asks_at_the_port_that_is_set() -> None:
    told = json.loads(dict(whole("cpu"))["HEALTHCHECK"].partition("CMD ")[2])
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 1 else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {**os.environ, "NIBBLE_PORT": str(server.server_port)}
        ended = [
            subprocess.run([sys.executable, *told[1:]], env=env, stderr=subprocess.DEVNULL)
            for _ in range(2)
        ]
        server.shutdown()
    assert asked == ["/health", "/health"]
    assert [one.returncode == 0 for one in ended] == [True, False]


@pytest.mark.parametrize("script", ["image.sh", "image-run.sh", "tools.sh"])
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / "deploy" / script)], capture_output=True)
    assert done.returncode == 0, done.stderr
