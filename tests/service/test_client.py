"""The client: what it sends, and what it makes of the answers. The server's side of the same
contract is tested through the command line in tests/service/commands/test_server.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.client import AdapterDirectoryIncomplete, Client, ServerRefused, ServerUnreachable

Answer = Callable[[httpx.Request], httpx.Response]


def client(answer: Answer) -> Client:
    return Client("http://server/", transport=httpx.MockTransport(answer))


def adapter_directory(path: Path, template: str | None = None) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (path / "adapter_model.safetensors").write_bytes(b"weights \x00\xff")
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def test_generate_posts_inputs_and_parameters() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/generate")
        assert json.loads(request.content) == {
            "inputs": [{"role": "user", "content": "hi"}],
            "parameters": {"adapter_id": "a@2"},
        }
        return httpx.Response(200, json={"generated_text": "ho"})

    with client(answer) as nibble:
        found = nibble.generate([{"role": "user", "content": "hi"}], {"adapter_id": "a@2"})
    assert found == {"generated_text": "ho"}


def test_stream_yields_every_event_and_skips_comments() -> None:
    body = ': ping\n\ndata: {"token": {"text": "a"}}\n\nid: 2\ndata:{"generated_text": "ab"}\n\n'
    with client(lambda request: httpx.Response(200, text=body)) as nibble:
        assert list(nibble.stream("x", {})) == [{"token": {"text": "a"}}, {"generated_text": "ab"}]


def test_an_error_in_the_stream_is_raised_after_its_tokens() -> None:
    body = 'data: {"token": {"text": "a"}}\n\ndata: {"error": "the engine ended"}\n\n'
    with client(lambda request: httpx.Response(200, text=body)) as nibble:
        events = nibble.stream("x", {})
        assert next(events) == {"token": {"text": "a"}}
        with pytest.raises(ServerRefused, match="the engine ended"):
            next(events)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_refusal_carries_status_and_message(streaming: bool) -> None:
    envelope = {"error": "adapter 'x' does not exist", "error_type": "not_found"}
    with client(lambda request: httpx.Response(404, json=envelope)) as nibble:
        with pytest.raises(ServerRefused, match="adapter 'x' does not exist") as refused:
            list(nibble.stream("x", {})) if streaming else nibble.generate("x", {})
        assert refused.value.status == 404
        assert refused.value.body == envelope


def test_an_answer_of_some_other_server_is_an_error() -> None:
    with (
        client(lambda request: httpx.Response(502, text="<html>")) as nibble,
        pytest.raises(ServerRefused, match="Bad Gateway"),
    ):
        nibble.adapters()
    with (
        client(lambda request: httpx.Response(200, text="<html>")) as nibble,
        pytest.raises(ServerRefused, match="not answer like a nibble"),
    ):
        nibble.adapters()


@pytest.mark.parametrize("key", ["adapters", "templates", "collections"])
def test_lists_are_read_page_by_page(key: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == f"/{key}"
        asked.append(dict(request.url.params))
        after = request.url.params.get("after", "")
        names = [name for name in "abcde" if name > after][:2]
        more = names[-1] < "e"
        return httpx.Response(200, json={key: [{"name": n} for n in names], "has_more": more})

    with client(answer) as nibble:
        listed = nibble.adapters("slot") if key == "adapters" else getattr(nibble, key)()
    assert listed == {key: [{"name": name} for name in "abcde"]}
    assert [one.get("after") for one in asked] == [None, "b", "d"]
    assert {one.get("resident") for one in asked} == {"slot" if key == "adapters" else None}
    assert {one["limit"] for one in asked} == {"1000"}


def test_nobody_there() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client(answer) as nibble:
        with pytest.raises(ServerUnreachable, match="no server answers at http://server"):
            nibble.generate("x", {})
        with pytest.raises(ServerUnreachable):
            list(nibble.stream("x", {}))


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_push_sends_config_weights_and_template(tmp_path: Path, template: str | None) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        assert (request.method, request.url.path) == ("POST", "/adapters")
        assert b'name="name"\r\n\r\nmine\r\n' in body
        assert b'{"peft_type": "LORA"}' in body
        assert b"weights \x00\xff" in body
        assert (b'name="template"' in body) == (template is not None)
        assert b'name="placement"\r\n\r\nmerged\r\n' in body
        assert b"merged_dtype" not in body
        return httpx.Response(201, json={"name": "mine", "version": 1})

    directory = adapter_directory(tmp_path / "d", template)
    with client(answer) as nibble:
        assert nibble.push(directory, "mine", placement="merged")["version"] == 1


def test_push_takes_the_name_that_adapter_hub_gives_the_weights(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert b"weights \x00\xff" in request.read()
        return httpx.Response(201, json={"name": "mine", "version": 1})

    directory = adapter_directory(tmp_path / "d")
    (directory / "adapter_model.safetensors").rename(directory / "adapter.safetensors")
    with client(answer) as nibble:
        assert nibble.push(directory, "mine")["version"] == 1


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_push_names_the_missing_file(tmp_path: Path, missing: str) -> None:
    directory = adapter_directory(tmp_path / "d")
    (directory / missing).unlink()
    with (
        client(lambda request: httpx.Response(500)) as nibble,
        pytest.raises(AdapterDirectoryIncomplete, match=missing),
    ):
        nibble.push(directory, "mine")


def test_names_are_quoted_in_paths() -> None:
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(204)

    with client(answer) as nibble:
        nibble.adapter("a@prod")
        nibble.adapter("../b")
        nibble.remove("a/../b?c")
        nibble.set_alias("a", "prod", 3)
        nibble.drop_alias("a", "x/y")
    assert paths == [
        "GET /adapters/a@prod",
        "GET /adapters/..%2Fb",
        "DELETE /adapters/a%2F..%2Fb%3Fc",
        "PUT /adapters/a/aliases/prod",
        "DELETE /adapters/a/aliases/x%2Fy",
    ]
