"""Tenants over HTTP: another's things are not there, quotas refuse early, and nothing leaks."""

from __future__ import annotations

import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.catalog import Catalog
from adapters.prompts.template import PromptTemplate
from service.access.audit import AuditLog, find, lines, verify
from service.access.gate import Gate
from service.access.keys import Keys
from service.access.quotas import Meter, Tenants
from service.api.access import Guarded
from service.app import SLOW_AT_ONCE, create_app
from service.config import Settings
from service.jobs.order import FileStamp, Order
from tests.oracle import make_adapter
from tests.service.api.conftest import PATIENCE, Running, until
from tests.service.api.test_access import routes

OPERATOR = "the operator's own key"
EVERY = ["infer", "adapters:read", "adapters:write", "rag", "train"]
CANARY = "c4n4ry"
REFUSALS = 50
JOB = "ftjob-" + "5" * 24
FILES = (("GET", ""), ("GET", "/content"), ("DELETE", ""))  # routes of /v1/files/{id}
ALIASED = {"adapter_id": "own@prod", "max_new_tokens": 2}


@dataclass(frozen=True)
class Site:
    """The server with keys: an operator, and two tenants who may all but operate."""

    admin: httpx.Client
    acme: httpx.Client
    zeta: httpx.Client
    audit: Path
    noted: Callable[[], None]  # waits until the audit log has every request so far


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

    def noted() -> None:
        server.settle()
        audit.flush()

    yield Site(*clients, audit=tmp_path / "audit", noted=noted)
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
        ("GET", "/templates/own/diff", None),
        ("POST", "/templates/own/render", {"input": "a"}),
        ("DELETE", "/templates/own", None),
        ("PUT", "/templates/own/aliases/mine", {"version": 1}),
        ("DELETE", "/templates/own/aliases/prod", None),
        ("POST", "/generate", {"inputs": "a", "template": {"name": "own"}}),
        ("GET", "/collections/own", None),
        ("GET", "/collections/own/documents", None),
        ("GET", "/collections/own/documents/a", None),
        ("DELETE", "/collections/own/documents/a", None),
        ("POST", "/collections/own/documents", {"documents": [{"id": "a", "text": "b"}]}),
        ("POST", "/collections/own/files", None),
        ("POST", "/collections/own/search", {"query": "a", "mode": "lexical"}),
        ("DELETE", "/collections/own", None),
        ("GET", "/adapters", None),
        ("GET", "/v1/models", None),
        ("GET", "/templates", None),
        ("GET", "/collections", None),
        ("GET", "/v1/files", None),
        ("GET", "/v1/fine_tuning/jobs", None),
        ("GET", f"/v1/fine_tuning/jobs/{JOB}", None),
        ("GET", f"/v1/fine_tuning/jobs/{JOB}/events?stream=true", None),
        ("GET", f"/v1/fine_tuning/jobs/{JOB}/checkpoints", None),
    ]
    for what in ("cancel", "pause", "resume", "publish"):
        found.append(("POST", f"/v1/fine_tuning/jobs/{JOB}/{what}", None))
    return found


def test_every_route_that_takes_a_name_is_asked_for_anothers(settings: Settings) -> None:
    """Those of files take ids that the server makes: the next test asks for them by themselves."""
    paths = [(method, path.partition("?")[0]) for method, path, _ in asked("sha256:" + "0" * 64)]
    paths += [(method, f"/v1/files/x{of}") for method, of in FILES]
    for route in routes(create_app(settings)):
        assert isinstance(route, Guarded)
        if "{" not in route.path or route.scopes in ((), ("admin",)):
            continue
        for method in route.methods - {"HEAD"}:
            found = [path for m, path in paths if m == method and route.path_regex.match(path)]
            assert found, f"nobody asks for another's: {method} {route.path}"


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


def test_what_is_anothers_is_answered_as_what_is_not_there(
    site: Site, server: Running, directory: Path
) -> None:
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
    assert server.desk.serving is not None
    stamp = FileStamp(sent.json()["id"], "rows.jsonl", ".jsonl", 1, "0" * 64)
    queue = server.desk.serving.jobs.queue.of("acme")
    queue.add(Order("tiny", "job", stamp), JOB)
    queue.cancel(JOB)  # it is there, and the server does not train it
    try:
        after = told(site.zeta, digest)
        for one, other in zip(before, after, strict=True):
            assert one == other
        statuses = [one[2] for one in before]
        assert statuses.count(404) >= 30, statuses
        assert all(one[2] == 200 for one in told(site.acme, digest, first=4))
        identity, nothing = sent.json()["id"], "file-" + "0" * 24
        for method, path in FILES:
            theirs = site.zeta.request(method, f"/v1/files/{identity}{path}")
            missing = site.zeta.request(method, f"/v1/files/{nothing}{path}")
            assert theirs.status_code == missing.status_code == 404
            assert theirs.text == missing.text.replace(nothing, identity)
        mine = site.acme.post("/generate", json={"inputs": "a", "parameters": ALIASED})
        reply, nobody = mine.headers["x-request-id"], "0" * 16
        theirs, missing = (
            site.zeta.post("/feedback", json={"request_id": one, "score": 1})
            for one in (reply, nobody)
        )
        assert theirs.status_code == missing.status_code == 404
        assert theirs.json()["error"] == missing.json()["error"].replace(nobody, reply)
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
        for wrong, audience, field in (
            (path.replace("acme", "nobody"), ["*"], "tenant"),
            (path.replace("acme", "nobody"), [], "tenant"),
            (path, ["zeta", "zetta"], "audience"),
            (path, ["*", "zetta"], "audience"),
        ):
            refused = site.admin.put(wrong, json={"audience": audience})
            assert (refused.status_code, refused.json()["field"]) == (404, field)
            assert "has no keys yet" in refused.json()["error"]
        nothing = path.replace("/shared", "/nothing")
        assert site.admin.put(nothing, json={"audience": []}).status_code == 404
        assert site.zeta.post("/generate", json=body).status_code == 404
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


def test_who_may_only_train_changes_nothing_that_was_uploaded(
    site: Site, server: Running, directory: Path
) -> None:
    """A job's adapter is the newest version of its name, so it would serve in the other's place."""
    push(site.acme, "uploaded", directory)
    rows = b'{"prompt": "a", "completion": "b"}\n'
    form = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
    file_id = site.acme.post("/v1/files", **form).json()["id"]  # type: ignore[arg-type]
    assert server.desk.serving is not None
    token = server.desk.serving.gate.keys.create("trainer", "acme", ["train"]).token
    job = {"model": "tiny", "training_file": file_id, "suffix": "Uploaded", "seed": 1}
    try:
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {token}"}) as one:
            for more in ({}, {"dry_run": True}):
                refused = one.post("/v1/fine_tuning/jobs", json=job | more)
                assert refused.status_code == 403
                assert "scope adapters:write" in refused.json()["error"]["message"]
                assert 'scope="adapters:write"' in refused.headers["www-authenticate"]
            jobs = one.get("/v1/fine_tuning/jobs").json()["data"]
            assert "Uploaded" not in [each["user_provided_suffix"] for each in jobs]
        assert len(site.acme.get("/adapters/uploaded").json()["versions"]) == 1
    finally:
        site.acme.delete("/adapters/uploaded")
        site.acme.delete(f"/v1/files/{file_id}")


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
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall stands within a minute: as the next one begins, a window counts the
    last one's requests a little less, and lets one more pass."""
    now = time.time() // 60 * 60 + 20
    monkeypatch.setattr(time, "time", lambda: now)


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
    took, work, body_too_long = [], time.process_time(), {"inputs": "a boat " * 20_000}
    for _ in range(REFUSALS):
        started = time.perf_counter()
        refused = site.acme.post("/generate", json=body_too_long)
        took.append(time.perf_counter() - started)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "quota_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    work = (time.process_time() - work) / REFUSALS
    print(f"refused in {statistics.median(took) * 1e3:.1f} ms, {work * 1e3:.1f} of them work")
    # Of server and client together, and of their threads alone: on a machine with much to do a
    # clock on the wall would tell of others. To read these prompts would take more.
    assert work < 0.01
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
    site.noted()

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
    variables: dict[str, Any] = {"secret": {"type": "string"}}
    variables |= {"kind": {"type": "enum", "values": ["plain"], "default": "plain"}}
    variables |= {"number": {"type": "number", "maximum": 9, "default": 1}}
    template = {
        "name": "canary",
        "user": "{{ secret }}{{ kind }}{{ number }}",
        "variables": variables,
    }
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
            ("/templates/canary/render", {"variables": {"secret": "a", "kind": CANARY}}),
            ("/templates/canary/render", {"variables": {"secret": "a", "number": CANARY}}),
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
    site.noted()
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
    site.noted()
    logged = "".join(capfd.readouterr())
    assert logged.count("request") > asked
    assert CANARY not in logged
    assert CANARY not in site.acme.get("/metrics").text
    assert CANARY not in str(list(lines(site.audit)))


def test_one_tenant_s_requests_leave_room_for_another_s(
    site: Site, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a queue for eight, acme's four: it hears so before its body is read, zeta is served."""
    body = {"inputs": "two boats", "parameters": {"max_new_tokens": 2}}
    admission = server.desk.admission
    monkeypatch.setattr(admission, "max_queue", 8)
    monkeypatch.setattr(admission, "_shared", lambda: server.desk.serving.gate.several)  # type: ignore[union-attr]
    tickets = [admission.admit("acme") for _ in range(4)]
    try:
        refused = site.acme.post("/generate", json={"inputs": ["no prompt"]})
        assert (refused.status_code, refused.json()["error_type"]) == (429, "quota_exceeded")
        assert "4 requests wait, 4 of them yours, the bound is 8" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1
        assert site.zeta.post("/generate", json=body).status_code == 200
    finally:
        for ticket in tickets:
            ticket.release()
    assert site.acme.post("/generate", json=body).status_code == 200


def test_one_tenant_s_slow_work_holds_up_no_other(
    site: Site, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it deletes adapters on which long requests of its own run."""
    serving = server.desk.serving
    assert serving is not None
    serving.gate.several = True
    go, check = threading.Event(), serving.templates.renderer.check

    def slow(template: PromptTemplate) -> None:
        assert "wait" not in template.plain()["user"] or go.wait(PATIENCE)
        check(template)

    monkeypatch.setattr(serving.templates.renderer, "check", slow)
    with ThreadPoolExecutor(SLOW_AT_ONCE + 2) as clients:
        bodies = [{"name": f"slow{n}", "user": "wait"} for n in range(SLOW_AT_ONCE + 1)]
        waiting = [clients.submit(site.acme.post, "/templates", json=body) for body in bodies]
        until(lambda: server.desk.slow._lines)
        quick = {"name": "quick", "user": "{{ input }}"}
        try:
            assert site.zeta.post("/templates", json=quick).status_code == 201
        finally:
            go.set()
        assert [one.result().status_code for one in waiting] == [201] * len(waiting)
    for body in bodies:
        site.acme.delete(f"/templates/{body['name']}")
    site.zeta.delete("/templates/quick")
