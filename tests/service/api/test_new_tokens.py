"""An adapter with new tokens over HTTP: uploaded with its tokenizer, read, written, deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from tests.oracle import VOCABULARY, PeftOracle, make_adapter
from tests.service.api.conftest import Running

MORE = 5
TEXT = "a <new1> of b<new4>"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Path:
    where = tmp_path_factory.mktemp("new") / "tokens"
    return make_adapter(where, base_directory, "new_tokens_trained", seed=5, new_tokens=MORE)


@pytest.fixture(scope="module")
def pushed(server: Running, adapter: Path) -> Iterator[dict[str, Any]]:
    with Client(server.url) as client:
        yield client.push(adapter, "new-tokens")
        client.remove("new-tokens")


def generated(client: httpx.Client, text: str, **parameters: Any) -> dict[str, Any]:
    body = {"inputs": text, "parameters": {"max_new_tokens": 6, "details": True, **parameters}}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_it_is_served_as_peft_does(
    client: httpx.Client, pushed: dict[str, Any], adapter: Path, base_directory: Path
) -> None:
    assert (pushed["tokenizer"], pushed["vocabulary"]) == (True, VOCABULARY + MORE)
    named = {"adapter_id": "new-tokens", "decoder_input_details": True, "ignore_eos": True}
    details = generated(client, TEXT, **named)["details"]
    prompt = [token["id"] for token in details["prefill"]]
    assert {VOCABULARY + 1, VOCABULARY + 4} <= set(prompt)
    assert "".join(token["text"] for token in details["prefill"]) == TEXT
    want = PeftOracle(base_directory, adapter).greedy(prompt, 6).tokens
    assert [token["id"] for token in details["tokens"]] == want


def test_the_base_does_not_know_the_tokens(client: httpx.Client, pushed: dict[str, Any]) -> None:
    details = generated(client, TEXT, decoder_input_details=True)["details"]
    assert max(token["id"] for token in details["prefill"]) < VOCABULARY


def test_new_tokens_are_written_and_may_stop(client: httpx.Client, pushed: dict[str, Any]) -> None:
    hot = {
        "adapter_id": "new-tokens",
        "temperature": 100.0,
        "seed": 11,
        "max_new_tokens": 200,
        "ignore_eos": True,
    }
    tokens = generated(client, "a", **hot)["details"]["tokens"]
    new = [token for token in tokens if token["id"] >= VOCABULARY]
    assert new
    # Bytes of a character that was not completed come before it.
    assert all(token["text"].endswith(f"<new{token['id'] - VOCABULARY}>") for token in new)
    stopped = generated(client, "a", **hot, stop_token_ids=[new[0]["id"]])["details"]
    assert stopped["finish_reason"] == "eos_token"
    assert stopped["tokens"][-1]["id"] == new[0]["id"]


def test_its_tokenizer_can_be_asked(client: httpx.Client, pushed: dict[str, Any]) -> None:
    def ids(**more: str) -> list[int]:
        reply = client.post("/tokenize", json={"inputs": TEXT, **more})
        assert reply.status_code == 200, reply.text
        pieces = reply.json()
        assert all(one["text"] == TEXT[one["start"] : one["stop"]] for one in pieces)
        return [one["id"] for one in pieces]

    assert {VOCABULARY + 1, VOCABULARY + 4} <= set(ids(adapter_id="new-tokens"))
    assert max(ids()) < VOCABULARY
    assert ids(adapter_id="lora") == ids()
    missing = client.post("/tokenize", json={"inputs": TEXT, "adapter_id": "nobody"})
    assert missing.status_code == 404
    bad = client.post("/tokenize", json={"inputs": TEXT, "adapter_id": "new-tokens:x"})
    assert (bad.status_code, bad.json()["field"]) == (422, "adapter_id")


def test_a_grammar_is_followed_with_the_new_tokens(
    client: httpx.Client, pushed: dict[str, Any]
) -> None:
    """The regex has one way in the adapter's own tokens; the base must spell the same text."""
    parameters = {"grammar": {"type": "regex", "value": "(<new[0-4]>){3}"}, "max_new_tokens": 40}
    mine = generated(client, "a", adapter_id="new-tokens", **parameters)
    theirs = generated(client, "a", **parameters)
    for found in (mine, theirs):
        assert re.fullmatch("(<new[0-4]>){3}", found["generated_text"])
    assert all(token["id"] < VOCABULARY for token in theirs["details"]["tokens"])
    hot = {"temperature": 100.0, "seed": 3, "adapter_id": "new-tokens"}
    drawn = generated(client, "a", **parameters, **hot)["details"]["tokens"]
    assert any(token["id"] >= VOCABULARY for token in drawn)


def test_token_ids_of_clients_are_bounded_by_the_adapter(
    client: httpx.Client, pushed: dict[str, Any]
) -> None:
    for name, known in (("new-tokens", VOCABULARY + MORE), (None, VOCABULARY)):
        body = {"inputs": "a", "parameters": {"adapter_id": name, "stop_token_ids": [known]}}
        reply = client.post("/generate", json=body)
        assert reply.status_code == 422
        assert f"vocabulary of {known}" in reply.json()["error"]


def test_without_its_tokenizer_the_refusal_says_how_to_send_it(
    client: httpx.Client, adapter: Path
) -> None:
    reply = uploaded(client, adapter, None)
    assert reply.status_code == 422
    assert "tokenizer.json as the form's part 'tokenizer'" in reply.json()["error"]


def test_a_foreign_tokenizer_is_refused(client: httpx.Client, adapter: Path) -> None:
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"a": 0, "b": 1}
    content["model"]["merges"] = []
    content["added_tokens"] = []
    reply = uploaded(client, adapter, json.dumps(content).encode())
    assert reply.status_code == 422
    assert "every token of the base must mean the same" in reply.json()["error"]


def test_it_has_no_sum_with_others(client: httpx.Client, pushed: dict[str, Any]) -> None:
    body = {"inputs": "a", "parameters": {"adapter_id": "new-tokens:0.5,lora:0.5"}}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 422
    assert "vocabulary of its own" in reply.json()["error"]


def uploaded(client: httpx.Client, adapter: Path, tokenizer: bytes | None) -> httpx.Response:
    files = {
        "config": (adapter / "adapter_config.json").read_bytes(),
        "weights": (adapter / "adapter_model.safetensors").read_bytes(),
    }
    more = {} if tokenizer is None else {"tokenizer": tokenizer}
    return client.post("/adapters", data={"name": "other"}, files=files | more)
