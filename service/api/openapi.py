"""The OpenAPI document, with what no single route says: keys, what the door refuses, events."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema

from service.api import sse
from service.api.access import SCHEME
from service.api.errors import ErrorEnvelope
from service.api.openai_errors import OpenAIErrorEnvelope, refusal, speaks_openai

JSON = "application/json"
_OF_BODIES = {
    str(status): refusal(status, ErrorEnvelope)
    for status in (408, 413, 415, 422)  # too slow, too large, of another type, not as described
}


def install(app: FastAPI) -> None:
    """Serve the document at /openapi.json. It takes a second to make and needs no key, so it is
    made once, when it is first asked for, and not in the event loop."""
    plain, making = app.openapi, asyncio.Lock()

    @cache
    def document() -> dict[str, Any]:
        return described(plain())

    @cache
    def encoded() -> bytes:
        return json.dumps(document(), separators=(",", ":")).encode()

    async def answer(_: object) -> Response:
        async with making:
            body = await asyncio.to_thread(encoded)
        return Response(body, media_type=JSON)

    app.openapi = document  # type: ignore[method-assign]
    app.add_route("/openapi.json", answer, include_in_schema=False)


def described(api: dict[str, Any]) -> dict[str, Any]:
    """`api` as FastAPI makes it, completed in place."""
    for path, methods in api["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation and not speaks_openai(path):  # there: every 4XX
                operation["responses"] = dict(sorted((_OF_BODIES | operation["responses"]).items()))
            for reply in operation["responses"].values():
                _drop_assumed(reply.get("content", {}))
    components = api.setdefault("components", {})
    components["schemas"] = _envelopes() | sse.schemas() | components.get("schemas", {})
    components["securitySchemes"] = {
        SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "nbl_<id>_<secret>",
            "description": "An API key, where the server has any; the names are scopes, of which "
            "it needs one.",
        }
    }
    return api


def _envelopes() -> dict[str, Any]:
    """What refusals refer to: FastAPI knows only models that a route returns."""
    bodies = [(body, "serialization") for body in (ErrorEnvelope, OpenAIErrorEnvelope)]
    _, found = models_json_schema(bodies, ref_template=sse.REF)  # type: ignore[arg-type]
    return dict(found["$defs"])


def _drop_assumed(content: dict[str, Any]) -> None:
    """FastAPI adds JSON of any shape to a reply that a route describes as something else."""
    if len(content) > 1 and content.get(JSON) == {"schema": {}}:
        del content[JSON]
