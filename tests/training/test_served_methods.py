"""Every method of the registry from its data to an answer over HTTP, on the embedded base."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from base.load import Base, load_base
from base.mini import MINI
from training import base_cli, checkpoint
from training.cli import app
from training.evaluate import generate
from training.methods import METHODS
from training.tasks import TASKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PROMPT, TOKENS = "Once there was a small town", 8
LORA = {
    "rank 1": ["method.rank=1"],
    "rank 2": ["method.rank=2"],
    "LoRA+": ["optim.b_rate_ratio=16"],
    "PiSSA": ["method.init=pissa"],
    "OLoRA": ["method.init=olora"],
}
CASES: dict[str, list[str]] = {
    **{kind: [f"method.kind={kind}"] for kind, row in METHODS.items() if not row.makes_base},
    "bottleneck": ["method.kind=bottleneck", "method.variant=pfeiffer"],
    "Houlsby": ["method.kind=bottleneck", "method.variant=houlsby"],
    **LORA,
}
RATES = {"vera": 0.1, "ia3": 0.1, "vblora": 0.1, "prefix_tuning": 0.1, "p_tuning": 0.05}


@contextmanager
def serving(base: str, home: Path) -> Iterator[httpx.Client]:
    """A server that computes as training does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nibble = str(Path(sys.executable).with_name("nibble"))
    flags = ["--port", port, "--home", str(home), "--precision", "exact"]
    with (home / "serve.log").open("wb") as log:
        server = subprocess.Popen([nibble, "serve", "--base", base, *flags], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300.0) as client:
            deadline = time.monotonic() + 300
            while not _ready(client):
                assert server.poll() is None, (home / "serve.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield client
    finally:
        server.terminate()
        server.wait(60)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").is_success
    except httpx.TransportError:
        return False


def answer(client: httpx.Client, **parameters: Any) -> str:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS, **parameters}}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    said: str = reply.json()["generated_text"]
    return said


def certainty(client: httpx.Client, **parameters: Any) -> list[float]:
    """The log-probabilities of an answer: what a short training changes before it changes words."""
    body = {
        "inputs": PROMPT,
        "parameters": {"max_new_tokens": TOKENS, "details": True, **parameters},
    }
    details = client.post("/generate", json=body).raise_for_status().json()["details"]
    return [token["logprob"] for token in details["tokens"]]


@pytest.fixture(scope="module")
def mini() -> Base:
    return load_base(MINI, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving("mini", tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    rows = [json.dumps(item.row) for item in TASKS["facts"].items("train", 40, seed=1)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_it_trains_is_uploaded_and_answers_as_trained(
    mini: Base, server: httpx.Client, data: Path, tmp_path: Path, case: str
) -> None:
    name, out = case.lower().replace(" ", "-").replace("+", "-plus").replace("_", "-"), tmp_path
    sets = [*CASES[case], f"publish.name={name}", f"publish.url={server.base_url}"]
    flags = ["--data", str(data), "--steps", "20", "--batch-size", "4", "--out", str(out)]
    flags += ["--lr", str(RATES.get(case, 0.02))]
    asked = ["run", *flags, "--json", *(part for one in sets for part in ("--set", one))]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    ran = json.loads(done.output)
    assert (ran["published"], ran["steps"]) == (f"{name}@1", 20)
    shown = server.get(f"/adapters/{name}").json()
    assert shown["provenance"]["config"]["optim"]["steps"] == 20
    assert shown["provenance"]["data"]["train"]
    adapter = checkpoint.load(out, mini)
    prompt = mini.tokenizer.encode(PROMPT)
    trained = generate(mini, [prompt], max_new_tokens=TOKENS, adapter=adapter)[0]
    adapter.detach()
    served = answer(server, adapter_id=name)
    assert served.strip() == trained.strip()
    assert certainty(server, adapter_id=name) != certainty(server), "20 steps show"


@pytest.mark.parametrize("build", ["full", "dapt"])
def test_a_new_base_is_made_and_answers(data: Path, tmp_path: Path, build: str) -> None:
    text = tmp_path / "town.txt"
    said_often = "The smith of Arvelle sold {} copper bells to the mill.\n\n"
    text.write_text("".join(map(said_often.format, range(1, 121))))
    out = tmp_path / "new"
    flags = ["--data", str(data if build == "full" else text), "--out", str(out), "--steps", "20"]
    flags += ["--batch-size", "4", "--set", "data.max_length=128", "--json"]
    done = CliRunner().invoke(getattr(base_cli, build), flags)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["table"]
    with serving(str(out), tmp_path) as client:
        made = answer(client)
    base = load_base(out, device="cpu", dtype="float32", keep=False)
    said = generate(base, [base.tokenizer.encode(PROMPT)], max_new_tokens=TOKENS)[0]
    assert made.strip() == said.strip()
