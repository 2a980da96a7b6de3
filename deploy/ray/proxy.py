"""Ray's HTTP proxy gives every reply an id of its own, beside the one that our logs and feedback
know it by. Only the latter stays."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ID = b"x-request-id"


class OneId:
    """Around Ray's own middleware, which appends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def first(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                ids = [header for header in headers if header[0].lower() == ID]
                rest = [header for header in headers if header[0].lower() != ID]
                message = {**message, "headers": [*rest, *ids[:1]]}
            await send(message)

        await self._app(scope, receive, first)


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
    return [Middleware(OneId)]
