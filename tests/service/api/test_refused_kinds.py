"""What a refused upload or deletion is told, over HTTP: the field, and what would be accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from adapters.methods import REFUSED_METHODS
from tests.oracle import make_adapter

ROWS = "base_model.model.model.embed_tokens.trainable_tokens_delta"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("refused")
    made = {kind: make_adapter(home / kind, base_directory, kind) for kind in ("lora", "ia3")}
    rows = make_adapter(home / "rows", base_directory, "trainable_tokens", token_indices=[7, 9])
    return {**made, "trainable_tokens": rows}


def push(client: httpx.Client, directory: Path, **fields: Any) -> httpx.Response:
    config = json.loads((directory / "adapter_config.json").read_text()) | fields
    weights = (directory / "adapter_model.safetensors").read_bytes()
    files = {"config": json.dumps(config).encode(), "weights": weights}
    return client.post("/adapters", data={"name": "refused"}, files=files)


def refusal(reply: httpx.Response, status: int = 422) -> str:
    assert reply.status_code == status, reply.text
    return json.dumps(reply.json(), ensure_ascii=False)


@pytest.mark.parametrize("method", ["XLORA", "NOVEL", "lora"])
def test_a_method_without_a_row_or_with_a_router(
    method: str, client: httpx.Client, saved: dict[str, Path]
) -> None:
    text = refusal(push(client, saved["lora"], peft_type=method))
    assert "peft_type" in text
    assert "expected one of LORA" in text
    assert REFUSED_METHODS.get(method, "is not served") in text


@pytest.mark.parametrize("kind", ["lora", "ia3", "trainable_tokens"])
def test_an_unknown_field_is_named(kind: str, client: httpx.Client, saved: dict[str, Path]) -> None:
    text = refusal(push(client, saved[kind], twist=3))
    assert "twist" in text
    assert "may change what the adapter computes" in text


def test_a_token_that_the_base_does_not_know(client: httpx.Client, saved: dict[str, Path]) -> None:
    text = refusal(push(client, saved["trainable_tokens"], token_indices=[7, 512]))
    assert "token 512" in text
    assert "512 rows" in text


def test_a_resized_vocabulary_is_told_the_numbers(
    client: httpx.Client, saved: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(str(saved["lora"] / "adapter_model.safetensors"))
    longer = load_file(str(saved["trainable_tokens"] / "adapter_model.safetensors"))[ROWS]
    name = "base_model.model.model.embed_tokens.weight"
    more = longer.new_zeros(515, longer.shape[1])
    save_file({**tensors, name: more}, str(tmp_path / "adapter_model.safetensors"))
    config = (saved["lora"] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    text = refusal(push(client, tmp_path))
    assert name in text
    assert "resized from 512 to 515 rows" in text
    assert "lm_head" in text
    assert "modules_to_save" in text


def test_deleting_what_an_alias_points_to_names_the_alias(
    client: httpx.Client, saved: dict[str, Path]
) -> None:
    files = {
        "config": (saved["ia3"] / "adapter_config.json").read_bytes(),
        "weights": (saved["ia3"] / "adapter_model.safetensors").read_bytes(),
    }
    assert client.post("/adapters", data={"name": "held"}, files=files).status_code == 201
    assert client.put("/adapters/held/aliases/prod", json={"version": 1}).status_code == 200
    for reference in ("held", "held@1"):
        text = refusal(client.delete(f"/adapters/{reference}"), 409)
        assert "held@prod" in text
        assert "move or drop it first" in text
    assert client.delete("/adapters/held/aliases/prod").status_code == 200
    assert client.delete("/adapters/held").status_code == 200
