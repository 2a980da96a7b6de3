"""The routes are there before the first request asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import _IncludedRouter
from starlette.testclient import TestClient

from service.app import create_app, make_routes
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
