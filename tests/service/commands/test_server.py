"""The whole way: a server started by `nibble serve`, asked by the other commands, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from base.mini import MINI
from service import cli
from service.commands.server import default_url
from tests.oracle import make_adapter

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 240.0  # seconds; a bound for a broken server, not a measurement


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "shout", MINI, "dora", rank=3, seed=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "plain", MINI, rank=3, seed=2)


@dataclass(frozen=True)
class Running:
    """A `nibble serve` in a process of its own, and what it logs."""

    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    log = home / "log"
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--log-format", "json"]
    command += ["--home", str(home), "--adapters", "none"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NIBBLE_")}
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=environment) as process,
    ):
        try:
            yield Running(process, log)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(server: Running) -> str:
    """The address of the server, once it is ready."""
    end = time.monotonic() + PATIENCE
    address = ""
    while time.monotonic() < end:
        text = server.log.read_text()
        assert server.process.poll() is None, text
        address = address or next(
            (str(json.loads(line)["url"]) for line in text.splitlines() if '"url"' in line), ""
        )
        if address and httpx.get(f"{address}/ready").is_success:
            return address
        time.sleep(0.1)
    pytest.fail(f"not ready after {PATIENCE} s")


def nibble(*args: str, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(args))
    assert done.exit_code == status, done.output
    return done.output


def nibble_json(*args: str) -> Any:
    return json.loads(nibble(*args, "--json"))


def test_the_base_answers_and_streams_the_same(url: str) -> None:
    args = ("generate", "Once upon a time", "--max-new-tokens", "12", "--url", url)
    whole = nibble(*args)
    assert whole.strip()
    assert nibble(*args, "--stream") == whole


def test_an_adapter_from_push_to_removal(url: str, adapter: Path) -> None:
    to = ("--url", url)
    pushed = nibble_json("adapters", "push", str(adapter), "--name", "mine", *to)
    assert (pushed["name"], pushed["version"], pushed["kind"]) == ("mine", 1, "dora")
    assert [a["digest"] for a in nibble_json("adapters", "list", *to)["adapters"]] == [
        pushed["digest"]
    ]

    nibble("adapters", "alias", "mine", "prod", "1", *to)
    assert nibble_json("adapters", "show", "mine@prod", *to)["aliases"] == {"prod": 1}
    for reference in ("mine", "mine@1", "mine@prod", f"sha256:{pushed['digest']}"):
        reply = nibble_json("generate", "The", "--adapter", reference, "--max-new-tokens", "4", *to)
        assert reply["details"]["adapter"]["digest"] == pushed["digest"]
    base = nibble_json("generate", "The", "--max-new-tokens", "4", *to)
    assert base["details"]["adapter"] is None
    assert base["details"]["tokens"] != reply["details"]["tokens"]

    (used,) = nibble_json("adapters", "list", "--resident", *to)["adapters"]
    assert (used["tier"], used["hits"]) == ("slot", 4)
    assert "mine" in nibble("adapters", "list", "--resident", *to)
    assert nibble_json("adapters", "list", "--tier", "store", *to) == {"adapters": []}

    nibble("adapters", "alias", "mine", "prod", "--drop", *to)
    assert nibble_json("adapters", "show", "mine", *to)["aliases"] == {}
    nibble("adapters", "remove", "mine", *to)
    assert nibble_json("adapters", "list", *to) == {"adapters": []}
    assert "nibble adapters list" in nibble("adapters", "show", "mine", *to, status=1)


def test_sums_and_an_experiment(url: str, plain: Path) -> None:
    to = ("--url", url)
    nibble("adapters", "push", str(plain), "--name", "part", *to)
    made = nibble_json(
        "adapters", "compose", "blend", "part:0.5", "--method", "svd", "--rank=2", *to
    )
    assert (made["name"], made["version"], made["rank"]) == ("blend", 1, 2)
    nibble("adapters", "compose", "blend", "part:0.5", "part@1:0.25", *to)
    nibble("adapters", "compose", "blend", "part:half", *to, status=2)
    said = nibble("adapters", "alias", "blend", "prod", "--split", "1:60", "--split", "2:40", *to)
    assert said.strip() == "blend@prod -> blend@1 (60), blend@2 (40)"
    nibble("adapters", "alias", "blend", "prod", "--split", "1", *to, status=2)
    given = {"adapter_id": "blend@prod", "max_new_tokens": 1}
    for n in range(2):
        asked = httpx.post(
            f"{url}/generate",
            json={"inputs": "The", "parameters": given},
            headers={"x-client-key": f"c{n}"},
        )
        nibble("adapters", "feedback", asked.headers["x-request-id"], str(n), *to)
    table = nibble_json("adapters", "experiment", "blend", "prod", *to)
    assert sum(arm["requests"] for arm in table["arms"]) == 2
    shown = nibble("adapters", "experiment", "blend", "prod", *to)
    assert "blend@2 less blend@1:" in shown
    assert "first_token_seconds" in shown
    assert "prod" in nibble("adapters", "remove", "blend@1", *to, status=1)
    nibble("adapters", "alias", "blend", "prod", "--drop", *to)
    for name in ("blend", "part"):
        nibble("adapters", "remove", name, *to)


def test_names_default_to_the_directory_and_placement_is_kept(url: str, adapter: Path) -> None:
    to = ("--url", url)
    pushed = nibble_json("adapters", "push", str(adapter), "--placement", "merged", *to)
    assert (pushed["name"], pushed["placement"]) == ("shout", "merged")
    table = nibble("adapters", "list", *to)
    assert "shout" in table
    assert pushed["digest"] in table, "the whole digest, so that it can be copied"


def test_a_broken_adapter_is_refused_with_the_reason(url: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "surprise": 1}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not at all")
    output = nibble("adapters", "push", str(tmp_path), "--name", "x", "--url", url, status=1)
    assert "HTTP 4" in output


def test_an_unknown_adapter_names_the_next_step(url: str) -> None:
    output = nibble("generate", "hi", "--adapter", "nobody", "--url", url, status=1)
    assert "'nobody' does not exist" in output
    assert "nibble adapters list" in output


@pytest.mark.parametrize(
    ("args", "lists"),
    [
        (("rag", "search", "gone", "a question"), "nibble rag list"),
        (("rag", "ask", "gone", "a question"), "nibble rag list"),
        (("templates", "show", "gone"), "nibble templates list"),
        (("jobs", "show", "ftjob-gone"), "nibble jobs list"),
    ],
)
def test_what_is_missing_is_listed_by_its_own_command(
    url: str, args: tuple[str, ...], lists: str
) -> None:
    assert lists in nibble(*args, "--url", url, status=1)


def test_an_address_with_a_path_is_told_so(url: str) -> None:
    output = nibble("adapters", "list", "--url", f"{url}/v1", status=1)
    assert "did you mean /adapters?" in output
    assert "without a path: --url http://HOST:PORT" in output


def test_sigterm_ends_with_zero(server: Running, url: str) -> None:
    """The last test here: the server is gone after it."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    output = nibble("generate", "hi", "--url", url, status=1)
    assert "nibble serve" in output, "it says how to start one"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.0.0.5", "http://10.0.0.5:9"),
        ("0.0.0.0", "http://127.0.0.1:9"),
        ("::1", "http://[::1]:9"),
        ("::", "http://127.0.0.1:9"),
    ],
)
def test_the_default_address_is_where_serve_would_listen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIBBLE_HOST", host)
    monkeypatch.setenv("NIBBLE_PORT", "9")
    assert default_url() == expected
