"""`nibble jobs`: what it asks of a server, and what it prints of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.client import Client
from service.commands import jobs

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "status": "running",
    "model": "mini",
    "method": {"type": "dora"},
    "fine_tuned_model": None,
    "created_at": 0,
    "progress": {"step": 3, "steps": 9, "tokens": 24, "train_loss": 0.5},
}
EVENT = {"id": "e", "created_at": 0, "level": "warn", "message": "it was killed", "data": {}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """Every request: method, path, JSON body; answered as the server's routes would."""
    requests: list[tuple[str, str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content[:1] == b"{" else request.content
        requests.append((request.method, request.url.path, body))
        path = request.url.path
        if path == "/info":
            return httpx.Response(200, json={"model_id": "mini"})
        if path == "/v1/files":
            return httpx.Response(200, json={"id": f"file-{len(requests)}"})
        if path.endswith("/events"):
            if "stream" in request.url.params:
                return httpx.Response(200, text=f"data: {json.dumps(EVENT)}\n\n")
            return httpx.Response(200, json={"data": [EVENT, {**EVENT, "message": "first"}]})
        if path.endswith("/ftjob-0"):
            error = {"message": "job 'ftjob-0' does not exist", "type": "invalid_request_error"}
            return httpx.Response(404, json={"error": error})
        listing = path.endswith("/jobs") and request.method == "GET"
        return httpx.Response(200, json={"data": [JOB]} if listing else JOB)

    @contextmanager
    def reach(url: str | None, as_json: bool) -> Iterator[Client]:
        with reaching("http://server", as_json) as found:
            found._http = httpx.Client(
                base_url="http://server", transport=httpx.MockTransport(answer)
            )
            yield found

    reaching: Callable[..., Any] = jobs.connect
    monkeypatch.setattr(jobs, "connect", reach)
    return requests


def run(*arguments: str) -> Result:
    return CliRunner().invoke(jobs.app, list(arguments))


def test_create_uploads_and_orders(asked: list[Any], tmp_path: Path) -> None:
    data, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    config.write_text("optim: {steps: 9, batch_size: 4}\n")
    flags = ["--config", str(config), "--set", "optim.steps=5", "--method", "dora"]
    done = run("create", str(data), "--eval", str(data), "--name", "desk", *flags)
    assert done.exit_code == 0, done.output
    assert b'filename="rows.jsonl"' in asked[1][2]
    assert asked[-1][2] == {
        "model": "mini",
        "training_file": "file-2",
        "validation_file": "file-3",
        "suffix": "desk",
        "method": {"type": "dora"},
        "seed": None,
        "config": {"optim": {"steps": 5, "batch_size": 4}},
        "template": None,
        "publish": True,
        "dry_run": False,
    }
    assert "ftjob-1" in done.output


def test_following_ends_with_what_became_of_it(asked: list[Any], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    done = run("create", str(data), "--follow")
    assert "warn: it was killed" in done.output
    assert done.exit_code == 1, "it did not succeed"


def test_list_and_events(asked: list[Any]) -> None:
    listed = run("list")
    assert "ftjob-1  running  3/9" in " ".join(listed.output.split("   "))
    told = run("events", "ftjob-1").output.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["first", "it was killed"]


@pytest.mark.parametrize("what", ["cancel", "pause", "resume"])
def test_what_is_asked_of_a_job(asked: list[Any], what: str) -> None:
    assert run(what, "ftjob-1").output == "ftjob-1: running\n"
    assert asked == [("POST", f"/v1/fine_tuning/jobs/ftjob-1/{what}", b"")]


def test_a_job_that_is_not_there(asked: list[Any]) -> None:
    done = run("show", "ftjob-0")
    assert done.exit_code == 1
    assert "job 'ftjob-0' does not exist" in done.stderr


@pytest.mark.parametrize("wrong", ["optim.steps", "optim=[", "a.b=1"])
def test_wrong_settings(asked: list[Any], tmp_path: Path, wrong: str) -> None:
    data, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    data.write_text("{}\n")
    config.write_text("a: 3\n")
    assert run("create", str(data), "--config", str(config), "--set", wrong).exit_code == 2
    assert asked == []


def test_publish_says_what_serves(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOB, "fine_tuned_model", "desk@3")
    assert run("publish", "ftjob-1").output == "desk@3 serves now\n"
    assert asked[-1][:2] == ("POST", "/v1/fine_tuning/jobs/ftjob-1/publish")
