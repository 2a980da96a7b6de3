"""Under /v1 every refusal has OpenAI's envelope, wherever it was raised."""

from __future__ import annotations

import httpx
import pytest

from service.api.openai_errors import OpenAIErrorEnvelope, openai_envelope, openai_status


@pytest.mark.parametrize(
    ("status", "there", "kind"),
    [
        (404, 404, "invalid_request_error"),
        (422, 400, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (503, 503, "server_error"),
        (507, 507, "server_error"),
    ],
)
def test_a_status_has_its_type(status: int, there: int, kind: str) -> None:
    body = openai_envelope(status, "a_code", "why", "a.field")
    assert OpenAIErrorEnvelope.model_validate(body).error.type == kind
    assert (body["error"]["code"], body["error"]["param"]) == ("a_code", "a.field")
    assert openai_status(status) == there


def test_a_route_that_is_not_there_says_so_in_each_skin(client: httpx.Client) -> None:
    there = client.get("/v1/nowhere")
    found = OpenAIErrorEnvelope.model_validate(there.json()).error
    assert (there.status_code, found.code) == (404, "not_found")
    assert "request_id" not in there.json()
    assert client.get("/v2/nowhere").json()["error_type"] == "not_found"


def test_the_door_speaks_it_too(client: httpx.Client) -> None:
    """Refused before any route sees it: a page of another site may not write here."""
    refused = client.post("/v1/nowhere", headers={"origin": "http://elsewhere.example"})
    found = OpenAIErrorEnvelope.model_validate(refused.json()).error
    assert (refused.status_code, found.type) == (403, "permission_error")
