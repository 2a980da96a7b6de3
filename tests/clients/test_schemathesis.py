"""schemathesis makes requests out of our own OpenAPI, good ones and bad ones, with the key of an
operator: no route answers with a 500, or with anything that it does not describe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.app import create_app
from service.config import SAMPLES, Settings
from tests.service.api.conftest import Running, until

EACH = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))  # requests drawn for each operation
RUNS = int(os.environ.get("SCHEMATHESIS_RUNS", "1"))  # each of another seed, so of other requests
FIRST_SEED = 7

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 * EACH)]

pytest.importorskip("schemathesis")

KEY = "a key of whoever runs the server"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "allow_header_conformance",
    "unsupported_method",
    "ignored_auth",
    "use_after_free",
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that asks for a key: without one it would close after the first `POST /keys`."""
    settings = Settings(
        home=tmp_path_factory.mktemp("guarded"),
        adapters=SAMPLES,
        admin_key=SecretStr(KEY),
        port=0,
        kv_cache_bytes=64 << 20,
    )
    running = Running(create_app(settings))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    yield running
    running.stop()


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + RUNS))
def test_every_operation_holds_its_promises(guarded: Running, tmp_path: Path, seed: int) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{guarded.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS)),
            *("--max-examples", str(EACH), "--seed", str(seed)),
            *("--continue-on-failure", "--no-shrink"),
            # Its deterministic mode would draw the same requests for every seed.
            *("--generation-database", "none", "--no-color", "--request-timeout", "60"),
            *("--report", "json", "--report-json-path", str(report)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert report.is_file()
    assert json.loads(report.read_text(encoding="utf-8"))
    print("".join(line for line in done.stdout.splitlines(True) if "generated" in line))
    assert guarded.desk.serving is not None
    assert guarded.desk.serving.engine.alive
