"""Tenants over HTTP: another's things are not there, quotas refuse early, and nothing leaks."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.catalog import Catalog
from service.access.audit import AuditLog, find, lines, verify
from service.access.gate import Gate
from service.access.keys import Keys
from service.access.quotas import Meter, Tenants
from tests.oracle import make_adapter
from tests.service.api.conftest import Running

OPERATOR = "the operator's own key"
EVERY = ["infer", "adapters:read", "adapters:write", "rag", "train"]
CANARY = "c4n4ry"


@dataclass(frozen=True)
class Site:
    """The server with keys: an operator, and two tenants who may all but operate."""

    admin: httpx.Client
    acme: httpx.Client
    zeta: httpx.Client
    audit: Path


@pytest.fixture
def site(server: Running, tmp_path: Path, empty_catalog: Path) -> Iterator[Site]:
    before = server.desk.serving
    assert before is not None
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    keys, audit = Keys(catalog), AuditLog(tmp_path / "audit")
    server.desk.serving = replace(
        before, gate=Gate(keys, OPERATOR), meter=Meter(Tenants(catalog)), audit=audit
    )
    tokens = (OPERATOR, *(keys.create("a key", t, EVERY).token for t in ("acme", "zeta")))
    clients = [
        httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {token}"}, timeout=60)
        for token in tokens
    ]
    yield Site(*clients, audit=tmp_path / "audit")
    for client in clients:
        client.close()
    server.desk.serving = before
    audit.close()
    catalog.close()


def push(client: httpx.Client, name: str, directory: Path) -> httpx.Response:
    files = {
        "config": (directory / "adapter_config.json").read_bytes(),
        "weights": (directory / "adapter_model.safetensors").read_bytes(),
    }
    return client.post("/adapters", data={"name": name}, files=files)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Path:
    return make_adapter(
        tmp_path_factory.mktemp("private") / "x", base_directory, "lora", rank=2, seed=77
    )


def asked(digest: str) -> list[tuple[str, str, Any]]:
    """Everything that names an adapter, a template or a collection."""
    chat = [{"role": "user", "content": "two boats"}]
    few = {"max_tokens": 2}
    found: list[tuple[str, str, Any]] = [
        ("GET", f"/adapters/{name}", None) for name in ("own", "own@1", "own@prod", digest)
    ]
    for name in ("own", "own@1", "own@prod", digest, "own:0.5,own:0.5"):
        parameters = {"adapter_id": name, "max_new_tokens": 2}
        found += [
            ("POST", "/generate", {"inputs": "two boats", "parameters": parameters}),
            ("POST", "/generate_stream", {"inputs": "two boats", "parameters": parameters}),
        ]
    found += [
        ("POST", "/v1/chat/completions", {"model": "own", "messages": chat, **few}),
        ("POST", "/v1/completions", {"model": "own", "prompt": "two boats", **few}),
        ("POST", "/v1/embeddings", {"model": "own", "input": "two boats"}),
        ("POST", "/tokenize", {"inputs": "two boats", "adapter_id": "own"}),
        ("GET", "/v1/models/own", None),
        ("DELETE", "/v1/models/own", None),
        ("DELETE", "/adapters/own", None),
        ("DELETE", "/adapters/own@1", None),
        ("POST", "/adapters/own/load", None),
        ("PUT", "/adapters/own/aliases/mine", {"version": 1}),
        ("PUT", "/adapters/own/aliases/mine", {"digest": digest}),
        ("DELETE", "/adapters/own/aliases/prod", None),
        ("GET", "/adapters/own/experiments/prod", None),
        ("POST", "/adapters/new/compose", {"parts": [{"adapter": "own"}], "method": "linear"}),
        ("GET", "/templates/own", None),
        ("GET", "/templates/own/versions", None),
        ("POST", "/templates/own/render", {"input": "a"}),
        ("DELETE", "/templates/own", None),
        ("PUT", "/templates/own/aliases/mine", {"version": 1}),
        ("POST", "/generate", {"inputs": "a", "template": {"name": "own"}}),
        ("GET", "/collections/own", None),
        ("GET", "/collections/own/documents", None),
        ("POST", "/collections/own/search", {"query": "a", "mode": "lexical"}),
        ("DELETE", "/collections/own", None),
        ("GET", "/adapters", None),
        ("GET", "/v1/models", None),
        ("GET", "/templates", None),
        ("GET", "/collections", None),
        ("GET", "/v1/files", None),
        ("GET", "/v1/fine_tuning/jobs", None),
    ]
    return found


def told(client: httpx.Client, digest: str, first: int | None = None) -> list[tuple[Any, ...]]:
    """What a client hears of all that, but for what differs from request to request."""
    found = []
    for method, path, body in asked(digest)[:first]:
        reply = client.request(method, path, json=body)
        passing = {"x-request-id", "date", "content-length"}
        headers = {k: v for k, v in reply.headers.items() if k not in passing}
        text = reply.text.replace(reply.headers["x-request-id"], "…")
        found.append((method, path, reply.status_code, headers, text))
    return found


def test_what_is_anothers_is_answered_as_what_is_not_there(site: Site, directory: Path) -> None:
    draft = push(site.acme, "draft", directory).json()
    digest = f"sha256:{draft['digest']}"
    assert site.acme.delete("/adapters/draft").status_code == 200
    before = told(site.zeta, digest)
    assert push(site.acme, "own", directory).json()["digest"] == draft["digest"]
    site.acme.put("/adapters/own/aliases/prod", json={"version": 1})
    site.acme.post("/templates", json={"name": "own", "user": "x {{ input }}"})
    site.acme.post("/collections", json={"name": "own"})
    rows = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
    sent = site.acme.post("/v1/files", files=rows, data={"purpose": "fine-tune"})
    try:
        after = told(site.zeta, digest)
        for one, other in zip(before, after, strict=True):
            assert one == other
        statuses = [one[2] for one in before]
        assert statuses.count(404) >= 30, statuses
        assert all(one[2] == 200 for one in told(site.acme, digest, first=4))
        identity, nothing = sent.json()["id"], "file-" + "0" * 24
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            theirs = site.zeta.request(method, f"/v1/files/{identity}{path}")
            missing = site.zeta.request(method, f"/v1/files/{nothing}{path}")
            assert theirs.status_code == missing.status_code == 404
            assert theirs.text == missing.text.replace(nothing, identity)
        job = {"model": "tiny", "training_file": identity}
        assert site.zeta.post("/v1/fine_tuning/jobs", json=job).status_code == 404
    finally:
        site.acme.delete("/adapters/own/aliases/prod")
        for path in ("/adapters/own", "/templates/own", "/collections/own"):
            site.acme.delete(path)
        site.acme.delete(f"/v1/files/{sent.json()['id']}")


def test_what_is_shared_serves_the_same_and_stays_the_owners(site: Site, directory: Path) -> None:
    push(site.acme, "shared", directory)
    parameters = {"adapter_id": "shared", "max_new_tokens": 4, "details": True}
    body = {"inputs": "two boats", "parameters": parameters}
    path = "/tenants/acme/shares/adapter/shared"
    try:
        assert site.zeta.post("/generate", json=body).status_code == 404
        assert site.zeta.put(path, json={"audience": ["*"]}).status_code == 403
        assert site.admin.put(path, json={"audience": ["zeta"]}).status_code == 200
        mine, theirs = (one.post("/generate", json=body).json() for one in (site.acme, site.zeta))
        assert mine["generated_text"] == theirs["generated_text"]
        assert mine["details"]["adapter"] == theirs["details"]["adapter"]
        # A prefix is one tenant's: how long a first token takes tells nothing of another's prompt.
        assert "shared" in [one["name"] for one in site.zeta.get("/adapters").json()["adapters"]]
        assert site.zeta.delete("/adapters/shared").status_code == 404
        assert site.admin.put(path, json={"audience": []}).status_code == 200
        assert site.zeta.post("/generate", json=body).status_code == 404
        assert site.admin.get("/tenants/shares").json() == {"shares": []}
    finally:
        site.admin.put(path, json={"audience": []})
        site.acme.delete("/adapters/shared")


def test_a_prefix_is_one_tenants(site: Site) -> None:
    body = {"inputs": "seven boats on the river " * 8, "parameters": {"max_new_tokens": 1}}
    body["parameters"]["details"] = True  # type: ignore[index]

    def cached(client: httpx.Client) -> int:
        found = client.post("/generate", json=body).json()
        return int(found["details"]["cached_tokens"])

    assert cached(site.acme) == 0
    assert cached(site.acme) > 0
    assert cached(site.zeta) == 0


@pytest.fixture
def minute() -> None:
    """Time left in this minute: as the next one begins, a window counts the last one's requests a
    little less, and lets one more pass."""
    if (second := time.time() % 60) > 45:
        time.sleep(60.1 - second)


@pytest.mark.usefixtures("minute")
def test_quotas_over_http(site: Site) -> None:
    body = {"inputs": "two boats", "parameters": {"max_new_tokens": 2}}
    chat = {"model": "mini", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    limits = {"requests_per_minute": 3}
    assert site.zeta.put("/tenants/acme/quotas", json=limits).status_code == 403
    assert site.admin.put("/tenants/acme/quotas", json=limits).status_code == 200
    assert site.admin.put("/tenants/nobody/quotas", json=limits).status_code == 404
    for _ in range(3):
        assert site.acme.post("/generate", json=body).status_code == 200
    took = []
    for _ in range(20):
        started = time.perf_counter()
        refused = site.acme.post("/generate", json={"inputs": "a" * 100_000})
        took.append(time.perf_counter() - started)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "quota_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    print(f"refused in {statistics.median(took) * 1e3:.1f} ms, at most {max(took) * 1e3:.1f}")
    assert min(took) < 0.01  # the others waited for their turn on a machine with much to do
    openai = site.acme.post("/v1/chat/completions", json=chat)
    assert (openai.status_code, openai.json()["error"]["type"]) == (429, "rate_limit_error")
    assert site.zeta.post("/generate", json=body).status_code == 200
    assert site.admin.put("/tenants/acme/quotas", json={}).status_code == 200
    assert site.acme.post("/generate", json=body).status_code == 200


@pytest.mark.usefixtures("minute")
def test_tokens_that_were_not_used_come_back(site: Site) -> None:
    site.admin.put("/tenants/acme/quotas", json={"tokens_per_minute": 100})
    body = {"inputs": "a", "parameters": {"max_new_tokens": 50, "stop_token_ids": [*range(64)]}}
    for _ in range(6):  # 50 are reserved each time, few are used
        reply = site.acme.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
    many = {"inputs": "a", "parameters": {"max_new_tokens": 55, "ignore_eos": True}}
    statuses = [site.acme.post("/generate", json=many).status_code for _ in range(2)]
    assert statuses[-1] == 429, statuses
    assert site.acme.get("/adapters").status_code == 200, "that takes no tokens"


def test_every_reply_is_found_with_what_served_it(site: Site, directory: Path) -> None:
    made = push(site.acme, "noted", directory)
    digest = made.json()["digest"]
    parameters = {"adapter_id": "noted", "max_new_tokens": 2}
    body = {"inputs": f"a {CANARY}", "parameters": parameters}
    chat = [{"role": "user", "content": CANARY}]
    replies = [
        site.acme.post("/generate", json=body),
        site.acme.post("/generate_stream", json=body),
        site.acme.post(
            "/v1/chat/completions", json={"model": "noted", "messages": chat, "max_tokens": 2}
        ),
        site.acme.post(
            "/v1/completions", json={"model": "noted", "prompt": [CANARY, "b"], "max_tokens": 2}
        ),
        site.acme.post("/v1/embeddings", json={"model": "noted", "input": CANARY}),
    ]
    base = site.acme.post("/generate", json={"inputs": CANARY, "parameters": {"max_new_tokens": 1}})
    gone = site.acme.delete("/adapters/noted")
    refused = site.acme.post("/keys", json={"name": "mine", "scopes": ["admin"]})
    time.sleep(0.5)

    def line(reply: httpx.Response) -> dict[str, Any]:
        (found,) = find(site.audit, reply.headers["x-request-id"])
        assert found["tenant"] == "acme"
        return found

    assert line(made)["digest"] == digest
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert line(reply)["digest"] == digest, reply.url
        assert line(reply)["adapter"] == [f"noted@1:{digest}"]
    assert "adapter" not in line(base)
    assert line(base)["base"] == site.acme.get("/info").json()["base"]["fingerprint"]
    assert line(gone)["digests"] == [digest]
    assert (refused.status_code, line(refused)["status"]) == (403, 403)
    assert verify(site.audit).broken is None
    assert CANARY not in str(list(lines(site.audit)))


def test_no_secret_shows_anywhere(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """A prompt, a key, a template's variable: over every way to fail, in no log, metric, error or
    line of the audit log."""
    key = {"authorization": f"Bearer nbl_{'0' * 12}_{CANARY}"}
    chat = [{"role": "user", "content": CANARY}]
    bad_regex = {"type": "regex", "value": "("}
    variables = {"secret": {"type": "string"}}
    template = {"name": "canary", "user": "{{ secret }}", "variables": variables}
    replies = [site.acme.post("/generate", json={"inputs": CANARY}, headers=key)]
    replies += [site.acme.get("/adapters", headers=key, params={"key": CANARY})]
    failing: list[tuple[str, Any]] = [
        ("/generate", {"inputs": CANARY, "parameters": {"max_new_tokens": -1}}),
        ("/generate", {"inputs": [{"role": "wizard", "content": CANARY}]}),
        ("/generate", {"inputs": [{"role": "user", "content": [CANARY]}]}),
        ("/generate", {"inputs": {"text": CANARY}}),
        ("/generate", {"inputs": CANARY, "parameters": {"adapter_id": "nothing"}}),
        ("/generate", {"inputs": CANARY * 20_000}),
        ("/generate", {"inputs": CANARY * 60_000}),
        (
            "/generate",
            {"inputs": CANARY, "parameters": {"grammar": bad_regex}},
        ),
        ("/generate", {"inputs": CANARY, "retrieval": {"collection": "nothing"}}),
        ("/generate", {"inputs": CANARY, "template": {"name": "nothing"}}),
        ("/generate_stream", {"inputs": CANARY, "parameters": {"temperature": 0}}),
        ("/generate_stream", {"inputs": CANARY * 20_000}),
        ("/v1/chat/completions", {"model": "nothing", "messages": chat}),
        ("/v1/chat/completions", {"model": "mini", "messages": chat, "n": 99}),
        ("/v1/chat/completions", {"model": "mini", "messages": [{"role": "x", "content": CANARY}]}),
        ("/v1/completions", {"model": "mini", "prompt": CANARY, "n": 99}),
        ("/v1/completions", {"model": "mini", "prompt": [[CANARY]]}),
        ("/v1/embeddings", {"model": "mini", "input": [[CANARY]]}),
        ("/v1/embeddings", {"model": "mini", "input": CANARY * 20_000}),
        ("/tokenize", {"inputs": [CANARY]}),
        ("/feedback", {"request_id": "nothing", "score": 1, "comment": CANARY}),
        ("/templates", {"name": "bad", "user": f"{CANARY} {{{{ input"}),
        ("/templates/nothing/render", {"input": CANARY, "variables": {"secret": CANARY}}),
        ("/collections/nothing/documents", {"documents": [{"id": "a", "text": CANARY}]}),
        ("/collections/nothing/search", {"query": CANARY}),
        ("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "nothing", "suffix": "a b"}),
    ]
    assert site.acme.post("/templates", json=template).status_code == 201
    try:
        failing += [
            ("/generate", {"template": {"name": "canary", "variables": {"wrong": CANARY}}}),
            ("/generate", {"template": {"name": "canary", "variables": {"secret": [CANARY]}}}),
            ("/templates/canary/render", {"variables": {"secret": {"a": CANARY}}}),
        ]
        for path, body in failing:
            reply = site.acme.post(path, json=body)
            assert reply.status_code >= 400 or "error" in reply.text, (path, reply.text[:300])
            replies.append(reply)
        for path in ("/generate", "/v1/chat/completions", "/templates"):
            torn = f'{{"inputs": "{CANARY}'.encode()
            replies.append(
                site.acme.post(path, content=torn, headers={"content-type": "application/json"})
            )
        rows = {"file": ("rows.exe", f'{{"prompt": "{CANARY}"'.encode())}
        replies.append(site.acme.post("/v1/files", files=rows, data={"purpose": "fine-tune"}))
        junk = {"config": CANARY.encode(), "weights": CANARY.encode()}
        replies.append(site.acme.post("/adapters", data={"name": "bad"}, files=junk))
        metrics = site.acme.get("/metrics").text
    finally:
        site.acme.delete("/templates/canary")
    time.sleep(0.5)
    for reply in replies:
        assert CANARY not in reply.text, (str(reply.url), reply.text[:500])
        assert CANARY not in str(reply.headers)
    logged = "".join(capfd.readouterr())
    assert logged.count("request") > len(failing)  # it is what the server logs
    assert CANARY not in logged
    assert CANARY not in metrics
    assert CANARY not in str(list(lines(site.audit)))


def fields(api: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """The names of a body's own fields, whichever form it has."""
    if "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield from schema.get("properties", {})
    for form in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from fields(api, form)


def wrong_bodies(api: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Bodies of every route that takes JSON, each with one field wrong that says the canary."""
    for path, methods in api["paths"].items():
        where = re.sub(r"\{[^}]*\}", "x", path)
        for method, operation in methods.items():
            media = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if media is None:
                continue
            for field in dict.fromkeys(fields(api, media["schema"])):
                for wrong in ({"a": [CANARY]}, [{"a": CANARY}], f"{CANARY} " * 5000):
                    yield method, where, {field: wrong}
            yield method, where, CANARY


def test_no_field_repeats_what_is_wrong_with_it(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of every route and field: what a client sends where it does not belong is in no refusal,
    log, metric or line of the audit log."""
    asked = 0
    for method, path, body in wrong_bodies(site.admin.get("/openapi.json").json()):
        reply = site.acme.request(method, path, json=body)
        assert reply.status_code != 500, (method, path, str(body)[:60])
        if reply.status_code >= 400:
            asked += 1
            assert CANARY not in reply.text, (method, path, str(body)[:60], reply.text[:300])
    assert asked > 400
    logged = "".join(capfd.readouterr())
    assert logged.count("request") > asked
    assert CANARY not in logged
    assert CANARY not in site.acme.get("/metrics").text
    time.sleep(0.5)
    assert CANARY not in str(list(lines(site.audit)))
