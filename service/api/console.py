"""The console: a page at `/` and its files under `/console/`.

Both are built from `service/console` (`make console`) and lie beside their sources, so that serving
them needs neither Node nor the network.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from service.api.access import Guarded, open_to_all

router = APIRouter(route_class=Guarded)

BUILT = Path(__file__).parents[1] / "console" / "built"
# No inline script or style, nothing from elsewhere, requests to this server only.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Names carry a hash of the content: a new build has new names, and the page is asked for anew.
_FOR_EVER = "public, max-age=31536000, immutable"


@router.head("/", include_in_schema=False)
@router.get("/", response_class=HTMLResponse, tags=["server"])
@open_to_all
async def console() -> HTMLResponse:
    """The console, for people."""
    headers = {
        "content-security-policy": _POLICY,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(_page(), headers=headers)


@router.get("/console/{name}", include_in_schema=False)
@open_to_all
async def asset(name: str) -> Response:
    """One file of the build, by a name that is one of them and never a path."""
    found = _assets().get(name)
    if found is None:
        raise HTTPException(404)
    content, media_type = found
    return Response(content, media_type=media_type, headers={"cache-control": _FOR_EVER})


@cache
def _page() -> str:
    return (BUILT / "index.html").read_text(encoding="utf-8")


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    """All files of the build: a few hundred kilobytes, read once."""
    return {
        path.name: (path.read_bytes(), _TYPES[path.suffix])
        for path in sorted((BUILT / "console").iterdir())
    }
