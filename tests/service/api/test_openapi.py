"""The description of the API: bounded, true, and its examples run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.config import Settings

NUMBERS = ("integer", "number")


@pytest.fixture(scope="module")
def api(settings: Settings) -> dict[str, Any]:
    return create_app(settings).openapi()


def operations(api: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in api["paths"].items():
        for method, described in methods.items():
            yield path, method, described


def incoming(api: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema that a client's data is held against, with where it stands."""
    for path, method, described in operations(api):
        for parameter in described.get("parameters", []):
            yield from _walk(api, f"{method} {path} {parameter['name']}", parameter["schema"])
        for media in described.get("requestBody", {}).get("content", {}).values():
            yield from _walk(api, f"{method} {path}", media["schema"])


def _walk(api: dict[str, Any], where: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, list):
        for one in schema:
            yield from _walk(api, where, one)
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _walk(api, f"{where} {name}", api["components"]["schemas"][name])
        return
    yield where, schema
    for key in ("anyOf", "oneOf", "allOf", "items"):
        yield from _walk(api, where, schema.get(key))
    for name, one in schema.get("properties", {}).items():
        yield from _walk(api, f"{where}.{name}", one)


def test_every_reference_leads_somewhere(api: dict[str, Any]) -> None:
    named = set(re.findall(r"'\$ref': '#/components/schemas/([^']+)'", str(api)))
    assert len(named) > 50
    assert named <= api["components"]["schemas"].keys()


def test_every_number_has_two_bounds(api: dict[str, Any]) -> None:
    numbers = [(where, one) for where, one in incoming(api) if one.get("type") in NUMBERS]
    assert len(numbers) > 20
    for where, one in numbers:
        assert {"minimum", "exclusiveMinimum"} & set(one), where
        assert {"maximum", "exclusiveMaximum"} & set(one), where


def test_every_text_is_bounded(api: dict[str, Any]) -> None:
    """By itself, or, where it is what a model reads, by the bound on its whole body."""
    bounds = {"maxLength", "enum", "const", "pattern", "format"}
    read = {"inputs", "prompt", "input", "content", "text", "arguments", "template", "metadata"}
    read |= {"guided_choice", "choice"}
    texts = [(where, one) for where, one in incoming(api) if one.get("type") == "string"]
    assert len(texts) > 50
    open_ones = {where for where, one in texts if not bounds & set(one)}
    assert {where.rpartition(".")[2] for where in open_ones} == read, open_ones


def test_every_list_is_bounded_and_no_field_is_unknown(api: dict[str, Any]) -> None:
    found = list(incoming(api))
    assert all("maxItems" in one for _, one in found if one.get("type") == "array")
    objects = [one for _, one in found if one.get("type") == "object"]
    assert len(objects) >= 6
    # A JSON schema is a client's own object; whoever compiles it bounds it.
    free = [where for where, one in found if one.get("additionalProperties") is True]
    schemas = {"value", "schema", "json", "guided_json", "parameters"}
    schemas |= {"metadata"}  # of a document: held against the fields of its collection
    schemas |= {"variables"}  # of a prompt template: held against what it declares
    schemas |= {"method", "config"}  # of a training job: held against the schema of training
    assert {where.rpartition(".")[2] for where in free} <= schemas, free
    # OpenAI's clients send fields of all ages: those are ignored, and everywhere else refused.
    # But for a training job, where a setting that is ignored would cost hours.
    lenient = [
        one
        for where, one in found
        if " /v1/" in where and " /v1/fi" not in where and one.get("type") == "object"
    ]
    bounded = [one for one in objects if "maxProperties" in one]
    closed = [one for one in objects if one.get("additionalProperties") is False]
    assert len(closed) >= len(objects) - len(free) - len(lenient) - len(bounded)
    # `retrieval` and `template`
    ours = [one for one in closed if {"collection", "variables"} & set(one.get("properties", {}))]
    assert not [one for one in closed if one in lenient and one not in ours]


def test_every_refusal_has_the_envelope(api: dict[str, Any]) -> None:
    for path, method, described in operations(api):
        for status, reply in described["responses"].items():
            if status[0] in "45":
                schema = reply["content"]["application/json"]["schema"]
                name = "OpenAIErrorEnvelope" if path.startswith("/v1/") else "ErrorEnvelope"
                assert schema == {"$ref": f"#/components/schemas/{name}"}, (path, method)
    assert "HTTPValidationError" not in api["components"]["schemas"]


def test_a_stream_is_described_as_one(api: dict[str, Any]) -> None:
    """Its events by the model of their data; and no JSON where nothing else comes."""
    found = {}
    for path, method, described in operations(api):
        content = described["responses"].get("200", {}).get("content", {})
        if "text/event-stream" in content:
            data = content["text/event-stream"]["schema"]["properties"]["data"]
            data = data.get("anyOf", [data])[0]  # the other is [DONE]
            named = data["contentSchema"]["$ref"].rpartition("/")[2]
            found[f"{method} {path}"] = (named, "application/json" in content)
    assert found["post /generate"] == found["post /"] == ("StreamEvent", True)
    assert found["post /generate_stream"] == ("StreamEvent", False)
    assert found["post /v1/chat/completions"] == ("ChatChunk", True)
    assert len(found) == 8


@pytest.mark.parametrize(
    "body", [b'{"a": "\xff"}', b"[" * 99_999, b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe\x00"]
)
def test_a_body_that_is_no_text_is_refused_as_described(
    api: dict[str, Any], client: httpx.Client, body: bytes
) -> None:
    asked = 0
    for path, method, described in operations(api):
        if "application/json" not in described.get("requestBody", {}).get("content", {}):
            continue
        filled = re.sub(r"\{\w+\}", "nobody", path)
        headers = {"content-type": "application/json"}
        reply = client.request(method, filled, content=body, headers=headers)
        if reply.status_code in (401, 403):
            continue  # off without a key: refused before the body is read
        asked += 1
        openai = path.startswith("/v1/")
        assert reply.status_code == (400 if openai else 422), (path, reply.text)
        assert str(reply.status_code) in described["responses"], path
        said = reply.json()["error"]
        assert "the body is not JSON" in (said["message"] if openai else said), (path, said)
    assert asked > 20


def examples(api: dict[str, Any]) -> list[tuple[str, str, Any]]:
    found = []
    for path, method, described in operations(api):
        body = described.get("requestBody", {}).get("content", {}).get("application/json")
        if body is None:
            continue
        schema = api["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
        assert schema["examples"], (path, "has a body, but no example of it")
        found += [(method, path, example) for example in schema["examples"]]
    return found


def test_every_example_runs(api: dict[str, Any], client: httpx.Client) -> None:
    found = examples(api)
    assert len(found) >= 8
    # First what makes the alias that the examples of others are about, and a request through it.
    found.sort(key=lambda one: (one[1] != "/templates", "{alias}" not in one[1]))
    for method, path, example in found:
        if path.endswith("load_lora_adapter") or path.startswith(("/keys", "/tenants")):
            continue  # off without a key, which would close the server: others test them
        name = "example" if path.endswith("/compose") else "lora"  # it would be a version of it
        name = "handbook" if path.startswith("/collections") else name
        name = "reader" if path.startswith("/templates") else name
        filled = path.replace("{name}", name).replace("{alias}", "example")
        if path == "/v1/fine_tuning/jobs":
            example = {**example, "training_file": upload(client), "model": "tiny"}
        if path == "/feedback":
            given = {"adapter_id": "lora@example", "max_new_tokens": 1}
            asked = client.post("/generate", json={"inputs": "a", "parameters": given})
            example = {**example, "request_id": asked.headers["x-request-id"]}
        for part in example.get("parts", []):
            part["adapter"] = "lora"  # whatever it is on a server with the samples
        reply = client.request(method, filled, json=example)
        assert reply.status_code in (200, 201), (path, reply.text)
        if path == "/v1/fine_tuning/jobs":
            assert client.post(f"{path}/{reply.json()['id']}/cancel").status_code == 200
    assert client.delete("/adapters/lora/aliases/example").status_code == 200
    client.delete("/adapters/example")
    client.delete("/collections/handbook")
    assert client.delete("/templates/reader/aliases/example").status_code == 200
    assert client.delete("/templates/reader").status_code == 200


def upload(client: httpx.Client) -> str:
    """The id of a small training file."""
    file = ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')
    sent = client.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"})
    assert sent.status_code == 200, sent.text
    return str(sent.json()["id"])


def test_every_operation_without_a_body_runs(api: dict[str, Any], client: httpx.Client) -> None:
    gets = [path for path, method, _ in operations(api) if method == "get"]
    own = {"/health", "/ready", "/info", "/metrics", "/adapters", "/adapters/{name}"}
    own |= {"/v1/models", "/v1/models/{model}"}
    assert set(gets) >= {*own, "/adapters/{name}/experiments/{alias}"}
    assert client.put("/adapters/dora/aliases/example", json={"version": 1}).status_code == 200
    body = {"model": "tiny", "training_file": upload(client)}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 200
    client.post("/collections", json={"name": "dora"})
    document = {"id": "a document", "text": "x"}
    client.post("/collections/dora/documents", json={"documents": [document]})
    client.post("/templates", json={"name": "dora", "user": "{{ input }}"})
    for path in gets:
        filled = path.replace("{document}", "a document")
        filled = filled.replace("{name}", "dora").replace("{alias}", "example")
        filled = filled.replace("{model}", "dora@example").replace("{job_id}", job["id"])
        filled = filled.replace("{file_id}", body["training_file"])
        assert client.get(filled).status_code == 200, path
    assert client.delete("/collections/dora").status_code == 200
    assert client.delete("/templates/dora").status_code == 200
    assert client.delete("/adapters/dora/aliases/example").status_code == 200


def test_page_is_whole_in_itself(client: httpx.Client) -> None:
    reply = client.get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", reply.text)
    assert "openapi.json" in reply.text
    document = client.get("/openapi.json")
    assert document.headers["content-type"] == "application/json"
    assert document.json()["info"]["title"] == "Nibble"
    assert client.get("/openapi.json").content == document.content
