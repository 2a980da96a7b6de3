"""The server about itself: health, readiness, information, metrics, tokens."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ConfigDict, Field

from service.api.access import Guarded, any_key, needs, open_to_all
from service.api.deps import Desk, DeskDep, ServingDep, loaded, unless_gone
from service.api.errors import Refused
from service.api.intake import client_key, reader
from service.api.wire import MAX_SEQUENCES, MAX_TOP_TOKENS, Incoming, Outgoing, Reference, refusals
from service.errors import EngineFailed

router = APIRouter(tags=["server"], route_class=Guarded)


class Health(Outgoing):
    status: Literal["alive"]


class Readiness(Outgoing):
    status: Literal["ready"]


class BaseView(Outgoing):
    """The base that is served."""

    id: str
    revision: str
    architecture: str
    fingerprint: str
    quantization: str
    layers: int
    hidden_size: int
    vocabulary: int
    positions: int


class Info(Outgoing):
    """What runs here; the first names are those of text-generation-inference."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    version: str
    router: str
    base: BaseView
    kernels: str
    precision: str
    kv_dtype: str


class TokenizeBody(Incoming):
    """A text to cut into tokens."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Once upon a time"}]})

    inputs: str = Field(min_length=1)
    adapter_id: Reference | None = Field(
        default=None,
        description="As in `/generate`: an adapter with new tokens reads with its own tokenizer.",
    )


class TokenPiece(Outgoing):
    """One token, and the characters [start, stop) of the text that it stands for."""

    id: int
    text: str
    start: int
    stop: int


def own_version() -> str:
    try:
        return version("nibble-serve")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"


def _alive(desk: Desk) -> bool:
    return desk.serving is not None and desk.serving.engine.alive


@router.get("/health", responses={200: {"model": Health}, **refusals(500)})
@open_to_all
async def health(desk: DeskDep) -> JSONResponse:
    """Whether this process lives: true from its first moment until its engine fails."""
    if desk.admission.state == "ready" and not _alive(desk):
        raise EngineFailed("the engine has stopped; restart this process")
    return JSONResponse({"status": "alive"})


@router.get("/ready", responses={200: {"model": Readiness}, **refusals(503)})
@open_to_all
async def ready(desk: DeskDep) -> JSONResponse:
    """Whether requests are taken: the base is loaded, and the server is not stopping."""
    desk.admission.check()
    if not _alive(desk):
        raise Refused(503, "engine_failed", "the engine has stopped; restart this process")
    return JSONResponse({"status": "ready"})


@router.get("/info", responses={200: {"model": Info}, **refusals(503)})
@any_key
async def info(desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """The base, its limits, and how it is computed."""
    from base.kernels import native_status

    spec, kv_dtype = serving.spec, desk.settings.kv_dtype
    body: dict[str, Any] = {
        "model_id": spec.id,
        "model_sha": spec.revision,
        "model_dtype": serving.dtype,
        "model_device_type": serving.device,
        "max_concurrent_requests": desk.settings.max_queue,
        "max_best_of": MAX_SEQUENCES,
        "max_stop_sequences": 16,
        "max_top_n_tokens": MAX_TOP_TOKENS,
        "max_input_tokens": serving.engine.max_model_len - 1,
        "max_total_tokens": serving.engine.max_model_len,
        "version": own_version(),
        "router": "nibble",
        "base": {
            "id": spec.id,
            "revision": spec.revision,
            "architecture": spec.architecture,
            "fingerprint": spec.fingerprint,
            "quantization": "nf4, double" if spec.double_quant else "nf4",
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "vocabulary": spec.vocab_size,
            "positions": spec.max_positions,
        },
        "kernels": native_status(),
        "precision": serving.precision,
        "kv_dtype": serving.dtype if kv_dtype == "auto" else kv_dtype,
    }
    return JSONResponse(body)


@router.get(
    "/metrics",
    responses={200: {"content": {"text/plain": {}}}, **refusals(401, 403, 503)},
)
@open_to_all
async def metrics(request: Request, desk: DeskDep) -> Response:
    """Prometheus' text format; for an admin's key where `protect_metrics` is set."""
    if desk.settings.protect_metrics:
        gate = loaded(desk).gate
        (await gate.caller(request.headers.get("authorization"))).check("admin")
    # In a thread: residents are asked of the engine, between two of its steps.
    text = await asyncio.to_thread(desk.metrics.exposition)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.post(
    "/tokenize", responses={200: {"model": list[TokenPiece]}, **refusals(404, 413, 415, 422, 503)}
)
@needs("infer")
async def tokenize(
    body: TokenizeBody, request: Request, desk: DeskDep, serving: ServingDep
) -> JSONResponse:
    """The tokens of a text and where they stand in it, without special tokens."""
    _, assembly = await reader(body.adapter_id, client_key(None, request), desk, serving)
    pieces = await unless_gone(request, assembly.pieces(body.inputs))
    return JSONResponse(
        [{"id": p.id, "text": p.text, "start": p.start, "stop": p.stop} for p in pieces]
    )
