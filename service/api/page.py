"""The OpenAPI page: every operation with examples that run, without anything from the network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.api.access import Guarded, open_to_all

router = APIRouter(route_class=Guarded)

# Everything is in the page itself; it may talk to this server only.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/docs", include_in_schema=False)
@open_to_all
async def page() -> HTMLResponse:
    return HTMLResponse(_page(), headers={"content-security-policy": _POLICY})


@cache
def _page() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")
