"""`nibble generate`: what it asks for, and what it prints of a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service.client import Client
from service.commands import generate, server


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies that reach the server. It answers with two tokens, and a held-back rest."""
    bodies: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = [
        {"token": {"text": "a ", "special": False}, "generated_text": None},
        {"token": {"text": "<x>", "special": True}, "generated_text": None},
        {"token": {"text": "", "special": False}, "generated_text": "a bee"},
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content) | {"path": request.url.path})
        if request.url.path == "/generate":
            return httpx.Response(200, json={"generated_text": "a bee"})
        return httpx.Response(200, text="".join(f"data:{json.dumps(t)}\n\n" for t in tokens))

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(
        server, "Client", lambda url, key=None: Client(url, key=key, transport=transport)
    )
    return bodies


def invoke(*args: str, input: str | None = None) -> str:
    done = CliRunner().invoke(generate.app, list(args), input=input)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_only_what_was_given_is_sent(asked: list[dict[str, Any]]) -> None:
    assert invoke("hello") == "a bee\n"
    assert asked == [{"path": "/generate", "inputs": "hello", "parameters": {}}]


def test_every_option_reaches_its_parameter(asked: list[dict[str, Any]]) -> None:
    sampled = ("--temperature", "0.5", "--seed", "3", "--stop", ".", "--stop", "!")
    invoke("hello", "--adapter", "a@2", "--max-new-tokens", "9", *sampled)
    assert asked[0]["parameters"] == {
        "adapter_id": "a@2",
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.5,
        "seed": 3,
        "stop": [".", "!"],
    }


def test_chat_and_system_send_messages(asked: list[dict[str, Any]]) -> None:
    user = {"role": "user", "content": "hello"}
    invoke("hello", "--chat")
    invoke("hello", "--system", "be kind")
    assert asked[0]["inputs"] == [user]
    assert asked[1]["inputs"] == [{"role": "system", "content": "be kind"}, user]


def test_a_dash_reads_standard_input(asked: list[dict[str, Any]]) -> None:
    invoke("-", input="from a pipe")
    assert asked[0]["inputs"] == "from a pipe"


def test_a_stream_prints_the_whole_text_once(asked: list[dict[str, Any]]) -> None:
    assert invoke("hello", "--stream") == "a bee\n"
    assert asked[0]["path"] == "/generate_stream"


def test_json_is_the_reply_or_one_event_a_line(asked: list[dict[str, Any]]) -> None:
    assert json.loads(invoke("hello", "--json")) == {"generated_text": "a bee"}
    assert asked[0]["parameters"] == {"details": True}
    lines = invoke("hello", "--json", "--stream").splitlines()
    assert [json.loads(line)["token"]["text"] for line in lines] == ["a ", "<x>", ""]
