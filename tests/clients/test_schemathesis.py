"""schemathesis makes requests out of our own OpenAPI, good ones and bad ones, with the key of an
operator: no route answers with a 500, or with anything that it does not describe.

`SCHEMATHESIS_REQUESTS` says how many different requests to send at least: after a first run with
all phases come others of further seeds, each against a new server, until there are so many."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service.app import create_app
from service.config import SAMPLES, Settings
from tests.service.api.conftest import Running, until

REQUESTS = int(os.environ.get("SCHEMATHESIS_REQUESTS", "1000"))
SEED = int(os.environ.get("SCHEMATHESIS_SEED", "7"))
FIRST, LATER = 10, 400  # requests drawn for an operation with a body, in the first run and later

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 + REQUESTS)]

pytest.importorskip("schemathesis")

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
DIGEST = 16  # bytes that the hooks keep of each request
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


@contextmanager
def guarded(home: Path) -> Iterator[Running]:
    """A server that asks for a key: without one it would close after the first `POST /keys`."""
    settings = Settings(
        home=home, adapters=SAMPLES, admin_key=SecretStr(KEY), port=0, kv_cache_bytes=64 << 20
    )
    running = Running(create_app(settings))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    yield running
    alive = running.desk.serving is not None and running.desk.serving.engine.alive
    running.stop()
    assert alive


def examples(operation: dict[str, Any], most: int) -> int:
    """How many requests to draw: without a body, and more so without a query, they repeat."""
    if "requestBody" in operation:
        return most
    places = {parameter["in"] for parameter in operation.get("parameters", ())}
    return max(most // (8 if places - {"path"} else 20), 10)


def config(url: str, most: int) -> str:
    document = httpx.get(f"{url}/openapi.json", timeout=60).raise_for_status().json()
    names: dict[int, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            names.setdefault(examples(operation, most), []).append(f"{method.upper()} {path}")
    return f"hooks = {json.dumps(str(HOOKS))}\n" + "".join(
        f"[[operations]]\ninclude-name = {json.dumps(named)}\n"
        f"generation = {{ max-examples = {count} }}\n"
        for count, named in names.items()
    )


def run(
    url: str, directory: Path, seed: int, most: int, *options: str
) -> subprocess.CompletedProcess[str]:
    (directory / "schemathesis.toml").write_text(config(url, most), encoding="utf-8")
    return subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
            *("run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
            *("--checks", ",".join(CHECKS), "--seed", str(seed), "--max-examples", str(most)),
            *("--continue-on-failure", "--no-shrink", "--no-color", "--request-timeout", "60"),
            # Its deterministic mode would draw the same requests for every seed.
            *("--generation-database", "none", *options),
        ],
        cwd=directory,
        env={**os.environ, "SCHEMATHESIS_SEEN": str(directory.parent / "seen")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_operation_holds_its_promises(tmp_path: Path) -> None:
    seen, seed, different = tmp_path / "seen", SEED, 0
    while different < REQUESTS:
        home, began = tmp_path / str(seed), perf_counter()
        home.mkdir()
        with guarded(home) as server:
            if seed == SEED:
                done = run(server.url, home, seed, FIRST)
            else:  # the other two phases are the same for every seed
                done = run(server.url, home, seed, LATER, "--phases", "fuzzing,stateful")
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
        before, different = different, seen.stat().st_size // DIGEST
        assert different > before, f"seed {seed} drew nothing new after {before} requests"
        sent = next(iter(re.findall(r"\d+ generated, .*", done.stdout)), "no summary")
        seconds = perf_counter() - began
        print(f"seed {seed}: {sent}; {different} different so far, {seconds:.0f} s", flush=True)
        seed += 1
