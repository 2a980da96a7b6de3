"""Who may use which route: every one of them says so, and holds to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, _IncludedRouter

from adapters.catalog import Catalog
from service.access.audit import AuditLog, lines
from service.access.caller import SCOPES
from service.access.gate import Gate
from service.access.keys import Keys
from service.api.access import Guarded, needs
from service.app import create_app
from service.config import Settings
from tests.service.api.conftest import Running

OPEN = {
    ("GET", "/"),
    ("HEAD", "/"),
    ("GET", "/console/{name}"),
    ("GET", "/docs"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
}
OPERATORS = {"/keys", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def routes(app: FastAPI) -> Iterator[APIRoute]:
    for included in app.router.routes:
        if isinstance(included, _IncludedRouter):
            for route in included.original_router.routes:
                assert isinstance(route, APIRoute), route
                yield route
        else:  # the document that says what the others need
            assert getattr(included, "path", "") == "/openapi.json", included


def test_every_route_says_who_may_use_it(settings: Settings) -> None:
    found = list(routes(create_app(settings)))
    assert len(found) > 55
    open_ones = set()
    for route in found:
        assert isinstance(route, Guarded), f"{route.path}: APIRouter(route_class=Guarded)"
        assert set(route.scopes) <= set(SCOPES)
        if not route.scopes:
            open_ones |= {(method, route.path) for method in route.methods}
    assert open_ones == OPEN
    operators = {r.path for r in found if isinstance(r, Guarded) and r.scopes == ("admin",)}
    assert operators >= OPERATORS


def test_a_route_that_says_nothing_cannot_be_made() -> None:
    router = APIRouter(route_class=Guarded)
    with pytest.raises(ValueError, match="say who may use it"):

        @router.get("/secret")
        async def secret() -> None: ...

    with pytest.raises(ValueError, match="no scopes"):
        needs("root")  # type: ignore[arg-type]


@pytest.fixture
def closed(server: Running, tmp_path: Path, empty_catalog: Path) -> Iterator[Keys]:
    """The server with a gate of its own; what is made here opens it. Its own catalog stays as it
    is: once it knew a key, the server would be closed for good."""
    before = server.desk.serving
    assert before is not None
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    server.desk.serving = replace(before, gate=Gate(Keys(catalog), "the operator's own key"))
    yield Keys(catalog)
    server.desk.serving = before
    catalog.close()


def sending(server: Running, token: str | None) -> httpx.Client:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def asked(route: Guarded) -> tuple[str, str]:
    path = route.path
    for name in ("{model:path}", "{document:path}", "{document_id:path}"):
        path = path.replace(name, "x")
    while "{" in path:
        head, _, rest = path.partition("{")
        path = f"{head}x{rest.partition('}')[2]}"
    return sorted(route.methods)[0], path


@pytest.mark.parametrize("token", [None, "sk-wrong", f"nbl_{'0' * 12}_{'0' * 64}"])
def test_no_guarded_route_opens_without_a_key(
    server: Running, closed: Keys, token: str | None
) -> None:
    with sending(server, token) as stranger:
        for route in routes(server.app):
            assert isinstance(route, Guarded)
            method, path = asked(route)
            reply = stranger.request(method, path, content=b"{" if method != "GET" else None)
            if not route.scopes:
                assert reply.status_code in (200, 404), path
                continue
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"].startswith("Bearer"), path
            body = reply.json()
            if path.startswith("/v1/"):
                assert body["error"]["type"] == "authentication_error", path
                assert body["error"]["code"] == "invalid_api_key", path
            else:
                assert body["error_type"] == "invalid_api_key", path


def test_each_scope_opens_its_routes_and_no_others(server: Running, closed: Keys) -> None:
    """Nothing is done here: where a key has the scope, what was sent is refused, or not found."""
    for scope in SCOPES:
        made = closed.create(f"only {scope}", "default", [scope])
        with sending(server, made.token) as client:
            for route in routes(server.app):
                assert isinstance(route, Guarded)
                method, path = asked(route)
                if not route.scopes or method == "GET":
                    continue
                reply = client.request(method, path, content=b"{")
                if scope in (*route.scopes, "admin"):
                    assert reply.status_code not in (401, 403), (scope, path)
                else:
                    assert reply.status_code == 403, (scope, path)
                    assert " or ".join(route.scopes) in reply.text, (scope, path)
                    assert "insufficient_scope" in reply.headers["www-authenticate"]
        closed.revoke(made.key.id)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("nibble.localhost", 200),
        ("nibble:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("[::1", 403),
    ],
)
def test_without_keys_a_name_that_was_led_here_opens_nothing(
    server: Running, closed: Keys, client: httpx.Client, host: str, status: int
) -> None:
    """A page of evil.example, whose name now means this machine, has that as its own origin."""
    server.desk.serving = replace(server.desk.serving, gate=Gate(closed))  # type: ignore[type-var]
    headers = {"host": host, "origin": f"http://{host}"}
    assert client.get("/adapters", headers=headers).status_code == status
    body = {"inputs": "two boats", "parameters": {"max_new_tokens": 1}}
    assert client.post("/generate", json=body, headers=headers).status_code == status
    if status == 403:
        made = closed.create("ci", "default", ["infer"])
        server.desk.serving = replace(server.desk.serving, gate=Gate(closed))
        headers = {"host": host, "authorization": f"Bearer {made.token}"}
        assert client.post("/generate", json=body, headers=headers).status_code == 200


def test_a_key_serves_and_its_revocation_ends_that_at_once(server: Running, closed: Keys) -> None:
    made = closed.create("ci", "default", ["infer"])
    body = {"inputs": "two boats", "parameters": {"max_new_tokens": 2}}
    with sending(server, made.token) as client, sending(server, "the operator's own key") as admin:
        assert client.post("/generate", json=body).status_code == 200
        assert client.get("/adapters").status_code == 403
        assert client.get("/keys").status_code == 403
        listed = admin.get("/keys").json()["keys"]
        assert made.key.id in [one["id"] for one in listed]
        assert made.token.rpartition("_")[2] not in str(listed)
        assert admin.delete(f"/keys/{made.key.id}").status_code == 200
        assert client.post("/generate", json=body).status_code == 401


def test_passages_want_the_scope_of_collections_too(server: Running, closed: Keys) -> None:
    made = closed.create("ci", "default", ["infer"])
    retrieval = {"collection": "x"}
    chat = {"model": "mini", "messages": [{"role": "user", "content": "a"}]}
    with sending(server, made.token) as client:
        for path, body in (
            ("/generate", {"inputs": "a", "retrieval": retrieval}),
            ("/v1/chat/completions", {**chat, "retrieval": retrieval}),
        ):
            reply = client.post(path, json=body)
            assert reply.status_code == 403, path
            assert "the scope rag" in reply.text


def test_keys_over_http(server: Running, closed: Keys) -> None:
    with sending(server, "the operator's own key") as admin:
        body = {"name": "web", "tenant": "acme", "scopes": ["infer", "rag"], "days": 7}
        made = admin.post("/keys", json=body)
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        with sending(server, made.json()["key"]) as client:
            assert client.get("/info").status_code == 200
        rotated = admin.post(f"/keys/{made.json()['id']}/rotate", json={"overlap_seconds": 0})
        assert rotated.status_code == 201
        again = admin.post(f"/keys/{made.json()['id']}/rotate", json={})
        assert again.status_code == 400
        assert admin.delete("/keys/ffffffffffff").status_code == 404
        bad = admin.post("/keys", json={**body, "scopes": ["root"]})
        assert bad.status_code == 422


def test_a_whole_key_in_a_path_is_in_no_log(
    server: Running, closed: Keys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where its id belongs, or anywhere else; whoever may do that, and who may not."""
    admin = closed.create("admin", "default", ["admin"]).token
    user = closed.create("user", "default", ["infer"]).token
    secret = user.rpartition("_")[2]
    serving, audit = server.desk.serving, AuditLog(tmp_path / "audit")
    assert serving is not None
    server.desk.serving = replace(serving, audit=audit)  # `closed` puts back what there was
    with httpx.Client(base_url=server.url) as client:
        for token in (admin, user):
            client.headers["authorization"] = f"Bearer {token}"
            for method, path in (
                ("POST", f"/keys/{user}/rotate"),
                ("DELETE", f"/keys/{user}"),
                ("GET", f"/adapters/{user}"),
                ("DELETE", f"/templates/{user}"),
            ):
                assert client.request(method, path).status_code in (403, 404, 405, 422)
    audit.close()
    logged = "".join(capfd.readouterr()) + str(list(lines(tmp_path / "audit")))
    assert logged.count(user.rpartition("_")[0]) >= 8
    assert secret[:8] not in logged


def test_metrics_can_be_kept_to_operators(server: Running, closed: Keys) -> None:
    made = closed.create("ci", "default", ["infer"])
    before = server.desk.settings
    server.desk.settings = before.model_copy(update={"protect_metrics": True})
    try:
        for token, status in ((None, 401), (made.token, 403), ("the operator's own key", 200)):
            with sending(server, token) as client:
                assert client.get("/metrics").status_code == status
    finally:
        server.desk.settings = before


def test_a_refused_body_is_not_read(server: Running, closed: Keys) -> None:
    """The key is looked at before the body: nobody without one can make the server parse."""
    with sending(server, None) as stranger:
        reply = stranger.post("/generate", content=b"[" * 200_000)
        assert reply.status_code == 401
