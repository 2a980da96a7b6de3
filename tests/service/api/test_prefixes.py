"""Virtual tokens over HTTP: what is refused, with the numbers, and that the rest answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.adapters.conftest import Saved
from tests.oracle import PeftOracle, make_adapter


def push(client: httpx.Client, saved: Saved, name: str, **form: Any) -> httpx.Response:
    files = {"config": saved.config, "weights": saved.weights.read_bytes()}
    return client.post("/adapters", data={"name": name, **form}, files=files)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Saved:
    home = tmp_path_factory.mktemp("prompts")
    return Saved(make_adapter(home / "a", base_directory, "prompt_tuning", rank=20))


def test_a_prefix_that_exceeds_the_context(
    client: httpx.Client, base_directory: Path, tmp_path: Path
) -> None:
    positions = json.loads((base_directory / "config.json").read_text())["max_position_embeddings"]
    made = make_adapter(tmp_path / "a", base_directory, "prompt_tuning", rank=positions - 1)
    reply = push(client, Saved(made), "long")
    assert reply.status_code == 422
    assert "num_virtual_tokens" in reply.text
    assert f"{positions - 1} virtual tokens" in reply.text
    assert f"is {positions}: at most {positions - 2} leave room" in reply.text


def test_a_prefix_is_not_merged(client: httpx.Client, prompts: Saved) -> None:
    reply = push(client, prompts, "merged", placement="merged")
    assert reply.status_code == 422
    assert "placement" in reply.text
    assert "nothing to merge" in reply.text


def test_a_reply_behind_virtual_tokens_is_peft_s(
    client: httpx.Client, prompts: Saved, base_directory: Path
) -> None:
    assert push(client, prompts, "soft").status_code == 201
    options = {"adapter_id": "soft", "max_new_tokens": 6, "details": True}
    reply = client.post("/generate", json={"inputs": "a text", "parameters": options})
    assert reply.status_code == 200, reply.text
    got = [token["id"] for token in reply.json()["details"]["tokens"]]
    ids = AutoTokenizer.from_pretrained(base_directory)("a text")["input_ids"]
    want = PeftOracle(base_directory, prompts.directory).greedy(ids, 6, stop=[2])
    assert got == want.tokens[: len(got)]
    assert len(got) == len(want.tokens)
