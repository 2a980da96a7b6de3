"""`nibble chat` from a pipe: what it asks, who answers, and what it prints where."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.client import Client
from service.commands import chat, server

ADAPTERS = [{"name": "cipher", "version": 1, "kind": "lora"}]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of the turns. Every answer is `bee`, in two pieces; `long` is refused."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/adapters":
            return httpx.Response(200, json={"adapters": ADAPTERS})
        if path == "/adapters/cipher":
            return httpx.Response(200, json=ADAPTERS[0])
        if path != "/generate_stream":
            return httpx.Response(404, json={"error": "adapter 'gone' does not exist"})
        body = json.loads(request.content)
        bodies.append(body)
        if body["inputs"][-1]["content"] == "long":
            return httpx.Response(422, json={"error": "the prompt has 9,000 tokens"})
        details = {"finish_reason": "eos_token", "prefill": None}
        events = [
            {"token": {"text": "b", "special": False}, "generated_text": None, "details": None},
            {"token": {"text": "", "special": True}, "generated_text": "bee", "details": details},
        ]
        return httpx.Response(200, text="".join(f"data:{json.dumps(e)}\n\n" for e in events))

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(server, "Client", lambda url, **_: Client(url, transport=transport))
    return bodies


def say(*lines: str, options: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(chat.app, list(options), input="".join(f"{x}\n" for x in lines))


def said(body: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in body["inputs"]]


def test_a_pipe_gets_answers_alone_and_each_turn_knows_those_before(asked: list[Any]) -> None:
    done = say("one", "", "two", "/reset", "three", "/quit", "four")
    assert (done.exit_code, done.stdout) == (0, "bee\n" * 3)
    assert [said(body) for body in asked] == [["one"], ["one", "bee", "two"], ["three"]]
    assert asked[0]["parameters"] == {}


def test_adapters_and_system_messages_change_on_the_way(asked: list[Any]) -> None:
    done = say("a", "/adapter cipher", "/adapter", "/system be kind", "b", "/base", "/system", "c")
    assert done.exit_code == 0, done.output
    assert [body["parameters"] for body in asked] == [{}, {"adapter_id": "cipher"}, {}]
    assert [body["inputs"][0]["role"] for body in asked] == ["user", "system", "user"]
    assert "* cipher  lora, version 1" in done.stderr


def test_json_is_one_line_for_each_answer(asked: list[Any]) -> None:
    done = say("a", "b", options=("--json", "--temperature", "0.5", "--seed", "3"))
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [{"generated_text": "bee", "finish_reason": "eos_token"}] * 2
    assert asked[0]["parameters"] == {"do_sample": True, "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize(
    ("lines", "options", "status", "message"),
    [
        (["a", "/adapter gone", "b"], (), 1, "'gone' does not exist"),
        (["a"], ("--adapter", "gone"), 1, "nibble adapters list"),
        (["a", "long", "b"], (), 1, "9,000 tokens"),
        (["a", "/adaptor cipher"], (), 2, "/adaptor is no command"),
    ],
)
def test_a_pipe_ends_at_what_is_wrong(
    asked: list[Any], lines: list[str], options: tuple[str, ...], status: int, message: str
) -> None:
    done = say(*lines, options=options)
    assert done.exit_code == status
    assert message in done.stderr
    assert "b" not in [said(body)[-1] for body in asked]


def test_at_a_terminal_a_refused_turn_is_forgotten_and_the_talk_goes_on(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.Client("http://server")  # type: ignore[attr-defined]
    talk = chat.Conversation(None, None, {})
    for line in ("one", "long", "two"):
        try:
            chat._take(client, talk, line, False)
        except chat.ServerRefused:
            assert line == "long"
    assert said(asked[-1]) == ["one", "bee", "two"]
