"""Every refusal: its status, its envelope, and what it must never say."""

from __future__ import annotations

import errno
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from adapters import errors as adapter_errors
from service import errors as service_errors
from service.admission import Loading
from service.api.errors import ErrorEnvelope, failure

CANARY = "canary-of-a-secret-prompt"
LONG = "x" * 500


def generate(**parameters: Any) -> dict[str, Any]:
    return {"json": {"inputs": CANARY, "parameters": parameters}}


def raw(body: bytes | str, kind: str = "application/json") -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": kind}}


def form(**parts: Any) -> dict[str, Any]:
    return {"files": {name: (None, value) for name, value in parts.items()}}


G, A = "POST /generate", "POST /adapters"
CASES: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    # numbers
    (G, generate(temperature=0), 422, "validation", "parameters.temperature", "0.01 (got 0)"),
    (G, generate(temperature=-1.5), 422, "validation", "parameters.temperature", "(got -1.5)"),
    (G, generate(temperature="hot"), 422, "validation", "parameters.temperature", "valid number"),
    (G, generate(max_new_tokens=0), 422, "validation", "parameters.max_new_tokens", "(got 0)"),
    (G, generate(max_new_tokens=-1), 422, "validation", "parameters.max_new_tokens", "(got -1)"),
    (G, generate(max_new_tokens=1.5), 422, "validation", "parameters.max_new_tokens", "(got 1.5)"),
    (G, generate(max_new_tokens="5"), 422, "validation", "parameters.max_new_tokens", "(got '5')"),
    (G, generate(max_new_tokens=True), 422, "validation", "parameters.max_new_tokens", "integer"),
    (G, generate(max_new_tokens=10**90), 422, "validation", "parameters.max_new_tokens", "…"),
    (G, generate(max_new_tokens=1200), 422, "validation", "parameters.max_new_tokens", "1024"),
    (G, generate(min_new_tokens=9, max_new_tokens=8), 422, "validation", None, "9"),
    (G, generate(top_p=0), 422, "validation", "parameters.top_p", "greater than 0"),
    (G, generate(top_p=1.1), 422, "validation", "parameters.top_p", "(got 1.1)"),
    (G, generate(min_p=-0.1), 422, "validation", "parameters.min_p", "(got -0.1)"),
    (G, generate(top_k=-1), 422, "validation", "parameters.top_k", "(got -1)"),
    (G, generate(repetition_penalty=0), 422, "validation", "parameters.repetition_penalty", "0.01"),
    (G, generate(presence_penalty=3), 422, "validation", "parameters.presence_penalty", "2"),
    (G, generate(frequency_penalty=-3), 422, "validation", "parameters.frequency_penalty", "-2"),
    (G, generate(seed=-1), 422, "validation", "parameters.seed", "(got -1)"),
    (G, generate(seed=2**64), 422, "validation", "parameters.seed", str(2**64)),
    (G, generate(n=17), 422, "validation", "parameters.n", "16 (got 17)"),
    (G, generate(top_n_tokens=21), 422, "validation", "parameters.top_n_tokens", "20"),
    (G, generate(truncate=0), 422, "validation", "parameters.truncate", "(got 0)"),
    (G, generate(stop=[""]), 422, "validation", "parameters.stop.0", "at least 1"),
    (G, generate(stop=["a"] * 17), 422, "validation", "parameters.stop", "at most 16"),
    (G, generate(stop=["a" * 257]), 422, "validation", "parameters.stop.0", "at most 256"),
    (G, generate(stop_token_ids=[-1]), 422, "validation", "parameters.stop_token_ids.0", "-1"),
    (G, generate(stop_token_ids=[512]), 422, "validation", "parameters.stop_token_ids", "of 512"),
    (G, raw('{"inputs":"a","parameters":{"top_p":NaN}}'), 422, "validation", None, "top_p"),
    (G, raw('{"inputs":"a","parameters":{"min_p":Infinity}}'), 422, "validation", None, "min_p"),
    # pairs and what is not offered
    (G, generate(n=2, best_of=2, do_sample=True), 422, "validation", "parameters.best_of", "one"),
    (G, generate(best_of=2), 422, "validation", "parameters.best_of", "do_sample"),
    (G, generate(typical_p=0.5), 422, "validation", "parameters.typical_p", "top_p"),
    (G, generate(watermark=True), 422, "validation", "parameters.watermark", "not offered"),
    (G, generate(adapter_source="hub"), 422, "validation", "parameters.adapter_source", "local"),
    (G, generate(api_token="hf_x"), 422, "validation", "parameters.api_token", "no such field"),
    (G, generate(max_tokens=5), 422, "validation", "parameters.max_tokens", "max_new_tokens?"),
    (G, {"json": {"prompt": CANARY}}, 422, "validation", "prompt", "known are inputs, parameters"),
    (
        G,
        {"json": {"inputs": "a", "adapter_id": "x"}},
        422,
        "validation",
        "adapter_id",
        "belongs in parameters",
    ),
    ("POST /chat/completions", {"json": {}}, 404, "not_found", None, "/v1/chat/completions?"),
    ("GET /api/adapters", {}, 404, "not_found", None, "did you mean /adapters?"),
    ("GET /info/", {}, 404, "not_found", None, "did you mean /info?"),
    ("GET /nowhere", {}, 404, "not_found", None, "/docs lists what does"),
    (G, generate(colour="red"), 422, "validation", "parameters.colour", "no such"),
    (
        "POST /generate_stream",
        generate(best_of=2, do_sample=True),
        422,
        "validation",
        "parameters.best_of",
        "n",
    ),
    # inputs
    (G, {"json": {"parameters": {}}}, 422, "validation", "inputs", "required"),
    (G, {"json": {"inputs": ""}}, 422, "validation", "inputs", "at least 1"),
    (G, {"json": {"inputs": 5}}, 422, "validation", "inputs", "a list of messages"),
    (G, {"json": {"inputs": []}}, 422, "validation", "inputs", "at least 1"),
    (
        G,
        {"json": {"inputs": [{"role": "boss", "content": CANARY}]}},
        422,
        "validation",
        "inputs.0.role",
        "'user'",
    ),
    (
        G,
        {"json": {"inputs": [{"role": "user", "content": [CANARY]}]}},
        422,
        "validation",
        "inputs.0.content",
        "valid string",
    ),
    (G, {"json": {"inputs": "k" * 1024}}, 422, "validation", "inputs", "1024 tokens"),
    (G, {"json": {"inputs": "word" * 9000}}, 422, "validation", "inputs", "36000 characters"),
    (G, {"json": [1]}, 422, "validation", None, "dictionary"),
    (G, raw('{"inputs":"\\ud800"}'), 422, "validation", "inputs", "unicode"),
    (G, raw('{"inputs": '), 422, "validation", None, "line 1, column 12: it ends too early"),
    (G, raw('{"inputs":"a",\n}'), 422, "validation", None, "a comma "),
    (G, raw('{"inputs":["a",]}'), 422, "validation", None, "a comma "),
    (
        G,
        raw("{'inputs':'a'}"),
        422,
        "validation",
        None,
        "column 2: names and texts stand in double",
    ),
    (G, raw(b'\xef\xbb\xbf{"inputs":'), 422, "validation", None, "ends too early"),
    (G, raw(b'{"inputs":"\xff"}'), 422, "validation", None, "no UTF-8 at byte 11"),
    (G, raw("[" * 100_000), 422, "validation", None, "nested too deeply"),
    (G, raw('{"inputs":' + "1" * 5000 + "}"), 422, "validation", None, "too many digits"),
    (G, raw('{"inputs":"a"}', "text/plain"), 415, "unsupported_media", None, "application/json"),
    (G, raw("inputs=a", "application/x-www-form-urlencoded"), 415, "unsupported_media", None, ""),
    (G, {"json": {"inputs": "x" * 300_000}}, 413, "too_large", None, "262144"),
    (G, {}, 422, "validation", None, "required"),
    # adapters
    (G, generate(adapter_id="nobody"), 404, "not_found", None, "GET /adapters lists"),
    (
        G,
        generate(adapter_id="lora@9"),
        404,
        "not_found",
        None,
        "GET /adapters/lora lists its versions",
    ),
    (G, generate(adapter_id="lora@prod"), 404, "not_found", None, "'lora@prod'"),
    (G, generate(adapter_id="sha256:" + "0" * 64), 404, "not_found", None, "sha256:0000"),
    (G, generate(adapter_id="../../etc/passwd"), 404, "not_found", None, "does not exist"),
    (G, generate(adapter_id="a\0b"), 404, "not_found", None, "does not exist"),
    (G, generate(adapter_id=""), 422, "validation", "parameters.adapter_id", "at least 1"),
    (G, generate(adapter_id="x" * 201), 422, "validation", "parameters.adapter_id", "at most 200"),
    ("GET /adapters/nobody", {}, 404, "not_found", None, "'nobody'"),
    ("DELETE /adapters/nobody", {}, 404, "not_found", None, "'nobody'"),
    ("DELETE /adapters/lora@x", {}, 404, "not_found", None, "'lora@x'"),
    ("POST /adapters/nobody/load", {}, 404, "not_found", None, "'nobody'"),
    ("POST /adapters/nobody/pin", {}, 404, "not_found", None, "'nobody'"),
    ("POST /adapters/nobody/unpin", {}, 404, "not_found", None, "'nobody'"),
    ("GET /adapters/" + "x" * 201, {}, 422, "validation", "name", "at most 200"),
    ("DELETE /adapters/lora/aliases/prod", {}, 404, "not_found", None, "lora@prod"),
    ("PUT /adapters/lora/aliases/prod", {"json": {}}, 422, "validation", "version", "either"),
    ("PUT /adapters/lora/aliases/prod", {"json": {"version": 0}}, 422, "validation", None, "0"),
    ("PUT /adapters/lora/aliases/prod", {"json": {"version": 9}}, 404, "not_found", None, "@9"),
    ("PUT /adapters/lora/aliases/7", {"json": {"version": 1}}, 422, "invalid_adapter", None, "7"),
    # uploads
    (A, {"json": {}}, 415, "unsupported_media", None, "multipart/form-data"),
    (A, raw("x", "multipart/form-data"), 415, "unsupported_media", None, "parts"),
    (A, raw("x", "multipart/form-data; boundary=b"), 422, "validation", None, "multipart"),
    (A, raw("--b\r\n", "multipart/form-data; boundary=b"), 422, "validation", None, "cut off"),
    (A, form(name=b"a", config=b"{}"), 422, "validation", "weights", "missing"),
    (A, form(name=b"a", weights=b"w"), 422, "validation", "config", "missing"),
    (A, form(name=b"a", colour=b"red"), 422, "validation", "colour", "known are"),
    (A, form(name=b"\xff", config=b"{}", weights=b"w"), 422, "validation", "name", "UTF-8"),
    (A, form(name=b"A b", config=b"{}", weights=b"w"), 422, "invalid_adapter", "name", "'A b'"),
    (A, form(name=b"../a", config=b"{}", weights=b"w"), 422, "invalid_adapter", "name", "'../a'"),
    (A, form(name=b"a" * 300, config=b"{}", weights=b"w"), 413, "too_large", "name", "256"),
    (
        A,
        form(name=b"a", config=b"{}", weights=b"w", placement=b"upside"),
        422,
        "validation",
        "placement",
        "unmerged",
    ),
    (A, form(name=b"a", config=b"{" * 300_000, weights=b"w"), 413, "too_large", "config", "262144"),
    (A, form(name=b"a", config=b"{}", weights=b"w" * (4 << 20) + b"w"), 413, "too_large", None, ""),
    (A, form(name=b"a", config=b"no", weights=b"w"), 422, "invalid_adapter", "config", "JSON"),
    # routes
    ("GET /nowhere/" + LONG, {}, 404, "not_found", None, "/docs"),
    ("GET /generate", {}, 405, "method_not_allowed", None, "POST"),
    ("DELETE /adapters", {}, 405, "method_not_allowed", None, "takes"),
    ("POST /tokenize", {"json": {"inputs": ""}}, 422, "validation", "inputs", "at least 1"),
    ("POST /tokenize", {"json": {}}, 422, "validation", "inputs", "required"),
    (
        G,
        {"json": {"inputs": "a"}, "headers": {"origin": "https://elsewhere.example"}},
        403,
        "forbidden",
        None,
        "elsewhere",
    ),
]


@pytest.mark.parametrize(
    ("route", "request_parts", "status", "kind", "field", "says"),
    CASES,
    ids=[f"{number}-{case[0][:30].split()[1]}" for number, case in enumerate(CASES)],
)
def test_refusal(
    client: httpx.Client,
    route: str,
    request_parts: dict[str, Any],
    status: int,
    kind: str,
    field: str | None,
    says: str,
) -> None:
    method, path = route.split(" ", 1)
    reply = client.request(method, path, **request_parts)
    assert reply.status_code == status, reply.text
    body = reply.json()
    ErrorEnvelope.model_validate(body)
    assert body["error_type"] == kind
    assert says in body["error"]
    if field is not None:
        assert body["field"] == field
    assert body["request_id"] == reply.headers["x-request-id"]
    assert CANARY not in reply.text
    assert len(reply.text) < 700


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/adapters", "GET, POST"),
        ("/adapters/lora", "GET, DELETE"),
        ("/adapters/lora/aliases/prod", "PUT, DELETE"),
        ("/v1/models/lora", "GET, DELETE"),
        ("/", "GET, POST"),
    ],
)
def test_another_method_is_told_all_that_there_are(
    client: httpx.Client, path: str, allowed: str
) -> None:
    reply = client.request("PATCH", path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
    assert f"it takes {allowed}" in reply.text


def test_all_faults_of_a_body_are_listed(client: httpx.Client) -> None:
    parameters = {"temperature": 0, "top_p": 2, "n": 0}
    error = client.post("/generate", json={"inputs": "a", "parameters": parameters}).json()["error"]
    assert all(name in error for name in parameters)
    many = client.post("/generate", json={"inputs": "a", "parameters": {"stop": [1] * 12}})
    assert "and 7 more" in many.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (service_errors.Overloaded("full", 2.2), 503, "overloaded", "3"),
        (service_errors.ColdLoads("full", 0.0), 429, "overloaded", "1"),
        (service_errors.Draining("bye"), 503, "draining", "5"),
        (Loading("soon"), 503, "loading", "5"),
        (service_errors.AdapterLoadFailed("no slot"), 503, "adapter_load_failed", "5"),
        (service_errors.EngineFailed("dead"), 500, "engine_failed", None),
        (service_errors.InvalidRequest("bad", "x"), 422, "validation", None),
        (service_errors.GenerationFailed("nan"), 500, "generation", None),
        (adapter_errors.InvalidAdapter("bad", "t"), 422, "invalid_adapter", None),
        (adapter_errors.TooLarge("big", "t"), 413, "too_large", None),
        (adapter_errors.UnsupportedMedia("pickle"), 415, "unsupported_media", None),
        (adapter_errors.InvalidChat("no user"), 422, "validation", None),
        (adapter_errors.AdapterNotFound("x"), 404, "not_found", None),
        (adapter_errors.AdapterInUse("alias"), 409, "in_use", None),
        (adapter_errors.StoreUnavailable("db"), 503, "store_unavailable", "5"),
        (adapter_errors.StoreFull("disk"), 507, "store_full", None),
        (OSError(errno.ENOSPC, "no space"), 507, "store_full", None),
        (adapter_errors.Unkeepable("NUL"), 422, "validation", None),
        (OSError(errno.EIO, "broken"), 503, "store_unavailable", None),
        (OSError(errno.EMFILE, "files"), 503, "store_unavailable", None),
        (HTTPException(418, "tea"), 418, "http", None),
    ],
)
def test_every_domain_error_has_its_status(
    error: Exception, status: int, kind: str, retry_after: str | None
) -> None:
    found = failure(error)
    assert (found.status, found.error_type) == (status, kind)
    assert found.headers.get("retry-after") == retry_after


def test_every_error_class_is_known() -> None:
    """A new class below the two trees must not end as an anonymous 500."""
    classes = [
        kind
        for module in (service_errors, adapter_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert len(classes) > 12
    for kind in classes:
        assert failure(kind("x")).error_type != "internal", kind


def test_an_unexpected_error_says_nothing_of_its_own() -> None:
    found = failure(RuntimeError(CANARY))
    assert (found.status, found.error_type) == (500, "internal")
    assert CANARY not in found.message


def test_what_a_database_s_driver_said_is_for_the_log() -> None:
    words = f'connection to server at "{CANARY}" failed: no password for user "{CANARY}"'
    try:
        try:
            raise OperationalError("SELECT 1", {}, Exception(words))
        except OperationalError as error:
            raise adapter_errors.StoreUnavailable(f"the catalog failed: {words}") from error
    except adapter_errors.StoreUnavailable as error:
        found = failure(error)
    assert (found.status, found.error_type) == (503, "store_unavailable")
    assert "the catalog failed" in found.message
    assert CANARY not in found.message
