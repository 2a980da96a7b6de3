"""OpenAI's error envelope, for every route under /v1:

    {"error": {"message": "…", "type": "invalid_request_error", "param": "training_file",
               "code": "not_found"}}

`code` is the error_type of the other routes. What they refuse with 422 is a 400 here, which is what
OpenAI's own server says and its clients expect. The request's id is in the x-request-id header.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

PREFIX = "/v1/"

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIError(BaseModel):
    """What was wrong."""

    message: str = Field(description="What was wrong, where, with which value; what is right.")
    type: str = Field(description="invalid_request_error, rate_limit_error, server_error, …")
    param: str | None = Field(default=None, description="The field to blame, if it is one.")
    code: str | None = Field(default=None, description="The kind of error, for programs.")


class OpenAIErrorEnvelope(BaseModel):
    """The body of every reply under /v1 that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "file 'file-0123' does not exist",
                        "type": "invalid_request_error",
                        "param": "training_file",
                        "code": "not_found",
                    }
                }
            ]
        }
    )

    error: OpenAIError


def speaks_openai(path: str) -> bool:
    """Whether errors of this path have this envelope."""
    return path.startswith(PREFIX)


def openai_status(status: int) -> int:
    return 400 if status == 422 else status


def openai_envelope(status: int, code: str, message: str, param: str | None) -> dict[str, Any]:
    """The body; `status` as the other routes have it."""
    kind = _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for errors of these routes."""
    found: dict[int | str, dict[str, Any]] = {
        openai_status(status): refusal(openai_status(status), OpenAIErrorEnvelope)
        for status in statuses
    }
    # Without it FastAPI would add a 422 of its own, which is never sent.
    return found | {"4XX": refusal("4XX", OpenAIErrorEnvelope)}


def refusal(status: int | str, body: type[BaseModel]) -> dict[str, Any]:
    """One entry. It refers to the body's schema: given the model, FastAPI would make a validator of
    it for each status of each route, which is a tenth of a second of every start."""
    return {
        "description": "Client Error" if isinstance(status, str) else HTTPStatus(status).phrase,
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        },
    }
