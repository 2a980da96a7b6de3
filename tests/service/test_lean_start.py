"""The second start of a server needs nothing of the libraries that take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from base import kernels

DEAR = {"transformers", "peft", "bitsandbytes", "accelerate", "sympy", "scipy", "pandas"}

_SERVER = """
import json, sys, time
from fastapi.testclient import TestClient
from service.app import create_app
from service.config import Settings

with TestClient(create_app(Settings()), "http://localhost") as client:
    while client.get("/ready").status_code != 200:
        time.sleep(0.25)
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 4}}
    reply = client.post("/generate", json=body)
    print(json.dumps([reply.status_code, reply.json(), sorted(sys.modules)]))
"""


@pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")
def test_a_second_start_imports_no_transformers(tmp_path: Path) -> None:
    environment = {**os.environ, "NIBBLE_HOME": str(tmp_path), "NIBBLE_DEVICE": "cpu"}
    root = Path(__file__).parents[2]

    def serve() -> tuple[str, set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", _SERVER],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        status, reply, modules = json.loads(done.stdout.splitlines()[-1])
        assert status == 200, reply
        return reply["generated_text"], set(modules)

    text, modules = serve()
    assert "transformers" in modules
    again, modules = serve()
    assert again == text
    assert not DEAR & modules
    assert "torch._dynamo" not in modules
