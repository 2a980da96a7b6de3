"""The routes are there before the first request asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute, _IncludedRouter
from starlette.testclient import TestClient

from service.api import hints
from service.app import create_app, make_routes, routers
from service.config import Settings


def test_no_request_waits_for_its_route_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    make = _IncludedRouter._build_effective_context

    def counted(router: _IncludedRouter, route: Any) -> Any:
        made.append(route)
        return make(router, route)

    monkeypatch.setattr(_IncludedRouter, "_build_effective_context", counted)
    app = create_app(Settings(home=tmp_path))
    make_routes(app)
    before = len(made)
    assert before > 50
    client = TestClient(app)
    for path in ("/health", "/nowhere", "/v1/models", "/adapters"):
        client.get(path)
    assert len(made) == before


def test_a_hint_can_be_asked_for_at_every_route(tmp_path: Path) -> None:
    """It reads the annotations of a handler, which need not be there when the handler runs."""
    known = {}
    for router in routers(Settings(home=tmp_path)):
        for route in router.routes:
            assert isinstance(route, APIRoute)
            found = hints.of_field(route.endpoint, ("body", "unknown"))
            known |= {f"{method} {route.path}": found for method in route.methods}
    assert known["PUT /adapters/{name}/aliases/{alias}"] == "; known are digest, split, version"
    assert known["GET /health"] == ""
