"""The one place where an error becomes an HTTP reply.

Every refusal has the same envelope:

    {"error": "what was wrong, where, with which value, what would be right",
     "error_type": "validation" | "not_found" | "overloaded" | …,
     "field": "parameters.temperature",     (where one field is to blame)
     "request_id": "…"}

`error` and `error_type` are the two keys that text-generation clients read. Under /v1 it is
OpenAI's envelope (`service.api.openai_errors`).
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from adapters.catalog import NAME
from adapters.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotFound,
    InvalidAdapter,
    InvalidChat,
    InvalidTemplate,
    QuotaReached,
    StoreFull,
    StoreUnavailable,
    TemplateNotFound,
    TooLarge,
    Unkeepable,
    UnsupportedMedia,
)
from adapters.json_fault import fault
from service.admission import Loading
from service.api import hints
from service.api.openai_errors import openai_envelope, openai_status, speaks_openai
from service.errors import (
    AdapterLoadFailed,
    ColdLoads,
    Draining,
    EngineFailed,
    Forbidden,
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExceeded,
    ServiceError,
    Unauthenticated,
    WrongState,
)
from service.retrieval.errors import (
    CollectionExists,
    CollectionNotFound,
    CollectionUnavailable,
    DocumentNotFound,
    DocumentRefused,
    EmbedderDiffers,
    EmbedderFailed,
    NotInstalled,
    RerankerFailed,
)

MAX_ECHO = 80  # characters of a bad value that an error repeats
MAX_LISTED = 5  # errors of one body that a reply lists
PARTS = frozenset({"body", "path", "query"})  # of a request, before the field's own place
UNNAMED = frozenset(  # parts of a place that are no field: tags of unions
    {"text", "chat", "list", "object", "several parts"}
    | {"one text", "texts", "ids", "several ids"}
)
PRIVATE = frozenset(
    {"inputs", "content", "template", "prompt", "input", "arguments", "documents"}
    | {"query", "filter", "metadata", "variables", "system", "assistant", "user"}
)  # never repeated, whatever is wrong

logger = structlog.get_logger("nibble.http")


class Refused(Exception):
    """A refusal that only HTTP knows: a body too large, a slow client, a foreign origin."""

    def __init__(self, status: int, error_type: str, message: str, field: str | None = None):
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.field = field


def too_slow(received: int, seconds: float) -> Refused:
    how = f"{received} bytes in {seconds:.0f} seconds"
    return Refused(408, "timeout", f"the body came too slowly: {how}")


class ErrorEnvelope(BaseModel):
    """The body of every reply that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": "adapter 'support' does not exist",
                    "error_type": "not_found",
                    "field": "parameters.adapter_id",
                    "request_id": "3f2a9c0d51e84b7f",
                }
            ]
        }
    )

    error: str = Field(description="What was wrong, where, with which value; what would be right.")
    error_type: str = Field(description="The kind of error, for programs.")
    field: str | None = Field(default=None, description="The field to blame, if it is one.")
    request_id: str = Field(description="Names this request in the server's log.")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as HTTP sees it."""

    status: int
    error_type: str
    message: str
    field: str | None = None
    headers: Mapping[str, str] = dataclass_field(default_factory=dict)

    def envelope(self, request_id: str) -> dict[str, str]:
        body = {"error": self.message, "error_type": self.error_type}
        if self.field:
            body["field"] = self.field
        return body | {"request_id": request_id}

    def reply(self, scope: Scope) -> JSONResponse:
        """In the envelope of the skin that `scope`'s path belongs to."""
        headers = dict(self.headers)
        if not speaks_openai(scope["path"]):
            return JSONResponse(self.envelope(scope["request_id"]), self.status, headers)
        body = openai_envelope(self.status, self.error_type, self.message, self.field)
        return JSONResponse(body, openai_status(self.status), headers)


# The first class that fits decides: subclasses stand before their bases.
_STATUS: Sequence[tuple[type[Exception], int, str]] = (
    (UnsupportedMedia, 415, "unsupported_media"),
    (TooLarge, 413, "too_large"),
    (InvalidAdapter, 422, "invalid_adapter"),
    (InvalidChat, 422, "validation"),
    (InvalidTemplate, 422, "invalid_template"),
    (TemplateNotFound, 404, "not_found"),
    (AdapterNotFound, 404, "not_found"),
    (AdapterInUse, 409, "in_use"),
    (StoreFull, 507, "store_full"),
    (StoreUnavailable, 503, "store_unavailable"),
    (QuotaReached, 429, "quota_exceeded"),
    (Unkeepable, 422, "validation"),
    (AdapterError, 500, "adapter"),
    (InvalidRequest, 422, "validation"),
    (CollectionNotFound, 404, "not_found"),
    (DocumentNotFound, 404, "not_found"),
    (CollectionExists, 409, "exists"),
    (EmbedderDiffers, 409, "embedder_differs"),
    (DocumentRefused, 422, "document_refused"),
    (EmbedderFailed, 503, "embedder_failed"),
    (RerankerFailed, 503, "reranker_failed"),
    (CollectionUnavailable, 503, "collection_unavailable"),
    (NotInstalled, 501, "not_installed"),
    (NotFound, 404, "not_found"),
    (WrongState, 400, "invalid_state"),
    (Unauthenticated, 401, "invalid_api_key"),
    (Forbidden, 403, "forbidden"),
    (QuotaExceeded, 429, "quota_exceeded"),
    (ColdLoads, 429, "overloaded"),
    (Overloaded, 503, "overloaded"),
    (Loading, 503, "loading"),
    (Draining, 503, "draining"),
    (AdapterLoadFailed, 503, "adapter_load_failed"),
    (EngineFailed, 500, "engine_failed"),
    (GenerationFailed, 500, "generation"),
    (ServiceError, 503, "unavailable"),
)
_HTTP = {
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}
# A driver's words name the database's host and user: they are for the log.
_WITHOUT_WORDS = "the catalog failed; the server's log has the cause under this id"
_INTERNAL = Failure(500, "internal", "the server failed; its log has the cause under this id")


def failure(error: BaseException) -> Failure:
    """What to answer when `error` ends a request."""
    if isinstance(error, Refused):
        headers = {"retry-after": "5"} if error.status in (429, 503) else {}
        return Failure(error.status, error.error_type, str(error), error.field, headers)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error, None)
    if isinstance(error, HTTPException) and error.status_code == 400:
        return Failure(422, "validation", f"the body is not JSON: {_unreadable(error.__cause__)}")
    if isinstance(error, HTTPException):
        kind = _HTTP.get(error.status_code, "http")
        return Failure(error.status_code, kind, str(error.detail), None, error.headers or {})
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(507, "store_full", "the server's disk is full; nothing was kept")
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE):
        reason = "the server's disk fails, or it has too many files open; nothing was kept"
        return Failure(503, "store_unavailable", reason)
    for cause, status, error_type in _STATUS:
        if isinstance(error, cause):
            of_driver = status >= 500 and isinstance(error.__cause__, SQLAlchemyError)
            words = _WITHOUT_WORDS if of_driver else str(error) + _listed(error)
            return Failure(status, error_type, words, _field(error), _headers(error, status))
    return _INTERNAL


def register(app: FastAPI) -> None:
    """Let every error of the routes of `app` end here."""
    for kind in (
        Refused,
        RequestValidationError,
        HTTPException,
        AdapterError,
        ServiceError,
        Exception,
    ):
        app.add_exception_handler(kind, _reply)


async def _reply(request: Request, error: Exception) -> JSONResponse:
    answer = failure(error)
    if answer.status >= 500:
        log_failure(error)
    if isinstance(error, Overloaded | QuotaExceeded | QuotaReached):
        request.app.state.desk.metrics.refused(answer.error_type)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        answer = _no_route(request, error.status_code)
    if isinstance(error, RequestValidationError) and not _is_json(request):
        wanted = "send a body with Content-Type: application/json"
        answer = Failure(415, "unsupported_media", wanted)
    elif isinstance(error, RequestValidationError):
        answer = _invalid_body(error, request.scope.get("endpoint"))
    return answer.reply(request.scope)


def log_failure(error: BaseException) -> None:
    """Log where `error` came from. Its message stays out: it may quote what a user sent."""
    if isinstance(error, Refused | Loading | Draining | Overloaded):
        return  # not a failure: the reply says it all
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_qualname}")
        trace = trace.tb_next
    own = isinstance(error, AdapterError | ServiceError)
    detail = {"reason": str(error)[:500]} if own else {}
    logger.error("request failed", kind=type(error).__name__, frames=frames[-12:], **detail)


def _listed(error: Exception) -> str:
    """Where to look for what was not found."""
    if not isinstance(error, AdapterNotFound):
        return ""
    name, at, _ = error.reference.partition("@")
    if at and NAME.fullmatch(name.lower()):
        return f"; GET /adapters/{name} lists its versions and aliases"
    return "; GET /adapters lists those that do"


def _field(error: Exception) -> str | None:
    if isinstance(error, InvalidRequest | NotFound):
        return error.field
    if isinstance(error, InvalidChat):
        return "inputs"
    if isinstance(error, TemplateNotFound):
        return "template"
    return error.where if isinstance(error, InvalidAdapter | InvalidTemplate) else None


def _headers(error: Exception, status: int) -> dict[str, str]:
    if isinstance(error, Overloaded | QuotaExceeded):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Unauthenticated):  # RFC 6750, section 3
        return {"www-authenticate": "Bearer" + (' error="invalid_token"' if error.sent else "")}
    if isinstance(error, Forbidden):
        scope = " ".join(error.wanted)
        return {"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}
    return {"retry-after": "5"} if status in (429, 503) else {}


def _no_route(request: Request, status: int) -> Failure:
    path = request.url.path[:MAX_ECHO]
    if status == 404:
        hint = hints.of_path(request) or "; /docs lists what does"
        return Failure(404, "not_found", f"{path!r} does not exist here{hint}")
    allowed = ", ".join(_methods(request))
    message = f"{path!r} does not take {request.method[:16]}; it takes {allowed}"
    return Failure(405, "method_not_allowed", message, None, {"allow": allowed})


def _methods(request: Request) -> list[str]:
    """All that this path takes; Starlette names those of the first route that has it."""
    return [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        for scope in [{**request.scope, "method": method}]
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    has_body = request.headers.get("content-length", "0") != "0" or (
        "transfer-encoding" in request.headers
    )
    json = kind == "application/json" or (kind.startswith("application/") and kind[-5:] == "+json")
    return json or not has_body


def _invalid_body(error: RequestValidationError, endpoint: Callable[..., Any] | None) -> Failure:
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return Failure(422, "validation", f"the body is not JSON: {_not_json(error)}")
    listed = [_explain(one, endpoint) for one in found[:MAX_LISTED]]
    if len(found) > MAX_LISTED:
        listed.append(f"and {len(found) - MAX_LISTED} more")
    return Failure(422, "validation", "; ".join(listed), _where(found[0]["loc"]) or None)


def _unreadable(cause: BaseException | None) -> str:
    """What FastAPI's 400 leaves out: why Python's parser gave up before it had any JSON."""
    if isinstance(cause, UnicodeDecodeError):
        return f"it is no {cause.encoding.upper()} at byte {cause.start}"
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    if isinstance(cause, ValueError):
        return "it has a number of too many digits"
    return "it could not be read"


def _where(loc: Sequence[Any]) -> str:
    """('body', 'inputs', 'messages', 0, 'role') -> 'inputs.0.role'; tags of unions left out."""
    own = loc[1:] if loc and loc[0] in PARTS else loc
    parts = [str(part) for part in own if part not in UNNAMED]
    return ".".join(parts)[: 2 * MAX_ECHO]


def _not_json(error: RequestValidationError) -> str:
    cause = error.__cause__
    return fault(cause) if isinstance(cause, json.JSONDecodeError) else "it could not be read"


def _explain(one: Mapping[str, Any], endpoint: Callable[..., Any] | None) -> str:
    where = _where(one["loc"]) or "body"
    message = str(one["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if one["type"] == "extra_forbidden":
        return f"{where}: there is no such field{hints.of_field(endpoint, one['loc'])}"
    if one["type"] == "union_tag_not_found":
        return f"{where}: should be a string or a list of messages"
    if one["type"] == "missing":
        return f"{where}: is required"
    return f"{where}: {message}{_echo(one)}"


def _echo(one: Mapping[str, Any]) -> str:
    """The bad value, when it is a short scalar of a field that holds no user's text. A longer text
    is no slip of a name: it may be a prompt in the wrong place."""
    value = one.get("input")
    private = len(one["loc"]) < 2 or any(part in PRIVATE for part in one["loc"])  # < 2: the body
    if private or not isinstance(value, str | int | float | bool | None):
        return ""
    shown = repr(value)
    if len(shown) <= MAX_ECHO:
        return f" (got {shown})"
    long = (
        f"a text of {len(value)} characters" if isinstance(value, str) else shown[:MAX_ECHO] + "…"
    )
    return f" (got {long})"
