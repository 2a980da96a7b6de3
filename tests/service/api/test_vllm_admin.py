"""vLLM's routes for controllers: for an admin's key, and no way out of the root."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapters.catalog import Catalog
from service.access.gate import Gate
from service.access.keys import Keys
from service.api.vllm_admin import beneath
from service.config import Settings
from service.errors import InvalidRequest
from tests.oracle import VOCABULARY, make_adapter
from tests.service.api.conftest import Running

KEY = "a-key-of-the-admin"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, adapter_directory: Path) -> Path:
    home = tmp_path_factory.mktemp("admin")
    (home / "root").mkdir()
    shutil.copytree(adapter_directory / "lora", home / "root" / "fresh")
    shutil.copytree(adapter_directory / "dora", home / "secret")
    (home / "root" / "link").symlink_to(home / "secret")
    (home / "root" / "inner").symlink_to(home / "root" / "fresh")
    return home / "root"


@pytest.fixture
def admin(
    server: Running, settings: Settings, root: Path, tmp_path: Path
) -> Iterator[httpx.Client]:
    """The server with a root, and a key that opens the routes."""
    catalog = Catalog(str(tmp_path / "keys.db"))
    before, serving = server.desk.settings, server.desk.serving
    assert serving is not None
    server.desk.settings = settings.model_copy(update={"adapter_root": root})
    server.desk.serving = replace(serving, gate=Gate(Keys(catalog), KEY))
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as found:
        yield found
    server.desk.settings, server.desk.serving = before, serving
    catalog.close()


def load(client: httpx.Client, name: str, path: str, **more: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, "base_model_name": "x", **more}
    return client.post("/v1/load_lora_adapter", json=body)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("given", [None, f"Bearer {KEY}"])
def test_off_until_there_is_a_key(
    admin: httpx.Client, server: Running, tmp_path: Path, given: str | None, local: bool
) -> None:
    """Also for this machine itself, which may do all else without a key."""
    catalog = Catalog(str(tmp_path / "none.db"))
    keys, serving = Keys(catalog), server.desk.serving
    assert serving is not None
    server.desk.serving = replace(serving, gate=Gate(keys, local=local))
    headers = {} if given is None else {"authorization": given}
    with httpx.Client(base_url=admin.base_url, headers=headers, timeout=60) as anybody:
        for reply in (
            load(anybody, "new", "fresh"),
            anybody.post("/v1/unload_lora_adapter", json={"lora_name": "lora"}),
        ):
            assert reply.status_code == 403
            said = reply.json()["error"]
            assert said["type"] == "permission_error"
            assert "nibble keys create NAME --scopes admin" in said["message"]
    made = keys.create("first", "default", ["admin"])
    server.desk.serving = replace(serving, gate=Gate(keys, local=local))
    headers = {"authorization": f"Bearer {made.token}"}
    with httpx.Client(base_url=admin.base_url, headers=headers, timeout=60) as operator:
        assert load(operator, "new", "fresh").status_code == 200
        gone = operator.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
        assert gone.status_code == 200
    server.desk.serving = serving
    catalog.close()


def test_off_without_a_root(admin: httpx.Client, server: Running, settings: Settings) -> None:
    server.desk.settings = settings
    reply = load(admin, "new", "fresh")
    assert reply.status_code == 400
    assert "adapter_root" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer é"]
)
def test_another_key_is_refused(admin: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    with httpx.Client(base_url=admin.base_url, headers=headers) as stranger:
        for reply in (
            load(stranger, "new", "fresh"),
            stranger.post("/v1/unload_lora_adapter", json={"lora_name": "lora"}),
        ):
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"


def test_load_serve_replace_unload(admin: httpx.Client, root: Path) -> None:
    assert load(admin, "new", "fresh").status_code == 200
    asked = {"model": "new", "prompt": "two boats", "max_tokens": 4, "temperature": 0}
    new = admin.post("/v1/completions", json=asked).json()
    old = admin.post("/v1/completions", json={**asked, "model": "lora"}).json()
    assert new["choices"] == old["choices"]
    again = load(admin, "new", str(root / "fresh"))
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    assert load(admin, "new", str(root / "inner"), load_inplace=True).status_code == 200
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert admin.post("/v1/completions", json=asked).status_code == 404
    gone = admin.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_new_tokens_are_loaded_with_the_tokenizer_beside_them(
    admin: httpx.Client, root: Path, base_directory: Path
) -> None:
    make_adapter(root / "tokens", base_directory, "new_tokens_trained", seed=5, new_tokens=3)
    reply = load(admin, "tokens", "tokens")
    assert reply.status_code == 200, reply.text
    asked = {"inputs": "a <new1>", "adapter_id": "tokens"}
    assert VOCABULARY + 1 in [one["id"] for one in admin.post("/tokenize", json=asked).json()]
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "tokens"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["../secret", "link", "/etc", ".", "", "fresh/../../secret", "nothing", "fresh\0", "~"]
)
def test_nothing_outside_of_the_root(admin: httpx.Client, root: Path, path: str) -> None:
    reply = load(admin, "new", path)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "lora_path"
    assert admin.get("/v1/models/new").status_code == 404
    with pytest.raises(InvalidRequest):
        beneath(root, str(root.parent / "secret"))
    with pytest.raises(InvalidRequest, match="adapter_root"):
        beneath(None, path)


def test_a_bad_adapter_is_refused_as_an_upload_is(admin: httpx.Client, root: Path) -> None:
    bad = root / "bad"
    shutil.copytree(root / "fresh", bad)
    (bad / "adapter_model.safetensors").write_bytes(b"no tensors")
    reply = load(admin, "bad", "bad")
    assert reply.status_code in (400, 415), reply.text
    assert admin.get("/v1/models/bad").status_code == 404
