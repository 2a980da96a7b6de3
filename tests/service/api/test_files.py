"""Training files over HTTP: what is kept, and what is refused before it is."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.service.api.conftest import Running

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 3


def send(client: httpx.Client, **parts: Any) -> httpx.Response:
    return client.post("/v1/files", files=parts)


def test_a_file_s_life_through_openai_s_sdk(server: Running) -> None:
    sdk = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    made = sdk.files.create(file=("../../rows.jsonl", ROWS), purpose="fine-tune")
    assert (made.filename, made.bytes, made.status) == ("rows.jsonl", len(ROWS), "processed")
    assert made.model_extra == {"sha256": hashlib.sha256(ROWS).hexdigest()}
    assert sdk.files.retrieve(made.id) == made
    assert sdk.files.content(made.id).read() == ROWS
    other = sdk.files.create(file=("b.csv", b"prompt,completion\na,b\n"), purpose="fine-tune")
    listed = [file.id for file in sdk.files.list(limit=1)]  # the SDK asks page after page
    assert listed[:2] == [other.id, made.id]
    assert sdk.files.delete(made.id).deleted
    assert made.id not in [file.id for file in sdk.files.list()]


@pytest.mark.parametrize(
    ("parts", "param", "said"),
    [
        ({"file": ("a.jsonl", ROWS)}, "purpose", "missing"),
        ({"purpose": (None, "fine-tune")}, "file", "missing"),
        ({"purpose": (None, "batch"), "file": ("a.jsonl", ROWS)}, "purpose", "got 'batch'"),
        ({"purpose": (None, "fine-tune"), "file": ("a.exe", ROWS)}, "file", ".jsonl"),
        ({"purpose": (None, "fine-tune"), "file": ("a.jsonl", b"")}, "file", "empty"),
        ({"purpose": (None, "x" * 65), "file": ("a.jsonl", ROWS)}, "purpose", "at most 64"),
        ({"odd": (None, "x")}, "odd", "no part 'odd'"),
    ],
)
def test_what_is_refused(
    client: httpx.Client, server: Running, parts: Any, param: str, said: str
) -> None:
    refused = send(client, **parts)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert not list(server.desk.upload_directory.iterdir())


@pytest.mark.parametrize(("path", "status"), [("/v1/files", 400), ("/adapters", 422)])
def test_a_boundary_that_is_too_long(client: httpx.Client, path: str, status: int) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={'b' * 300}"}
    refused = client.post(path, content=b"--b", headers=headers)
    assert refused.status_code == status, refused.text
    assert "boundary has 300 bytes; should have at most 70" in refused.text


def test_a_body_that_is_no_form(client: httpx.Client) -> None:
    refused = client.post("/v1/files", content=b"x", headers={"content-type": "text/plain"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media")


def test_a_file_beyond_the_cap(client: httpx.Client, server: Running) -> None:
    limit = server.desk.settings.max_file_bytes
    parts = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", b"x" * (limit + 1))}
    refused = send(client, **parts)
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "file")
    assert not list(server.desk.upload_directory.iterdir())


def test_a_full_disk_keeps_nothing(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = client.get("/v1/files").json()

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    parts = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", ROWS)}
    with monkeypatch.context() as patch:
        patch.setattr("service.api.file_upload.os", _Os(full))
        refused = send(client, **parts)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "store_full")
    assert not list(server.desk.upload_directory.iterdir())
    assert client.get("/v1/files").json() == before
    assert send(client, **parts).status_code == 200


class _Os:
    """`os`, but for `write`: the socket of the same process needs the real one."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_a_file_that_is_not_there(client: httpx.Client) -> None:
    for path in ("/v1/files/file-0", "/v1/files/file-0/content", "/v1/files/..%2f..%2fcatalog.db"):
        refused = client.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert client.delete("/v1/files/file-0").status_code == 404
