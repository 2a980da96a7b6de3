"""`/v1/models`: the base and its adapters, each as a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from adapters.errors import AdapterNotFound, InvalidAdapter
from adapters.manifest import AdapterManifest
from service.api.access import Guarded, needs
from service.api.adapters import delete_adapter
from service.api.deps import DeskDep, Serving, ServingDep
from service.api.openai.schema import MAX_MODEL
from service.api.openai.served import not_found
from service.api.openai_errors import openai_refusals
from service.api.paging import Limit, listed, pieces
from service.api.wire import Outgoing
from service.engine.request import AdapterRef
from service.errors import InvalidRequest

router = APIRouter(prefix="/v1/models", tags=["openai"], route_class=Guarded)

_STARTED = int(time.time())
After = Annotated[
    str,
    Query(max_length=MAX_MODEL, description="Begin behind this id, in the order of the list."),
]


class ModelCard(Outgoing):
    """A model, with what vLLM and its gateways read beside OpenAI's fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The base's id; of an adapter its digest, a model id too.")
    parent: str | None = Field(description="Of an adapter: the base's id.")
    max_model_len: int


class ModelList(Outgoing):
    object: Literal["list"]
    data: list[ModelCard]
    has_more: bool = Field(description="Whether `limit` cut some off: go on `after` the last.")


class ModelDeleted(Outgoing):
    id: str
    object: Literal["model"]
    deleted: bool


@router.get("", responses={200: {"model": ModelList}, **openai_refusals(422, 503)})
@needs("infer", "adapters:read")
async def list_models(
    desk: DeskDep, serving: ServingDep, limit: Limit = None, after: After = ""
) -> Response:
    """The base first, then the newest version of each adapter by name."""
    base = {serving.spec.id, *desk.settings.base_names}

    def cards() -> Iterator[Sequence[dict[str, Any]]]:
        if not after:
            yield [_base(serving, serving.spec.id)]
        begin = "" if after in base else after
        for manifests in pieces(serving.store.page, begin, lambda one: one.name):
            yield [_adapter(serving, one.name, one) for one in manifests]

    return await listed(cards(), limit, "data", object="list")


@router.get("/{model:path}", responses={200: {"model": ModelCard}, **openai_refusals(404, 503)})
@needs("infer", "adapters:read")
async def one(
    model: Annotated[str, Path(min_length=1, max_length=MAX_MODEL)],
    desk: DeskDep,
    serving: ServingDep,
) -> JSONResponse:
    """One model: the base, or an adapter as `name`, `name@version` or `name@alias`."""
    if model == serving.spec.id or model in desk.settings.base_names:
        return JSONResponse(_base(serving, model))
    try:
        manifest = await asyncio.to_thread(serving.store.resolve, model)
    except (AdapterNotFound, InvalidAdapter) as error:
        raise not_found(model) from error
    return JSONResponse(_adapter(serving, model, manifest))


@router.delete(
    "/{model:path}", responses={200: {"model": ModelDeleted}, **openai_refusals(404, 422, 503)}
)
@needs("adapters:write")
async def delete(
    model: Annotated[str, Path(min_length=1, max_length=MAX_MODEL)],
    desk: DeskDep,
    serving: ServingDep,
) -> JSONResponse:
    """Delete an adapter, as DELETE /adapters/{name} does. The base stays."""
    if model == serving.spec.id or model in desk.settings.base_names:
        raise InvalidRequest("the base cannot be deleted; name an adapter", "model")
    try:
        await desk.slowly(delete_adapter, model, serving)
    except (AdapterNotFound, InvalidAdapter) as error:
        raise not_found(model) from error
    return JSONResponse({"id": model, "object": "model", "deleted": True})


def _base(serving: Serving, name: str) -> dict[str, Any]:
    return _card(serving, name, _STARTED, serving.spec.id, None, 0)


def _adapter(serving: Serving, name: str, manifest: AdapterManifest) -> dict[str, Any]:
    created = int(datetime.fromisoformat(manifest.created).timestamp())
    root = f"sha256:{manifest.digest}"
    virtual = AdapterRef.of(manifest).virtual_tokens
    return _card(serving, name, created, root, serving.spec.id, virtual)


def _card(
    serving: Serving, name: str, created: int, root: str, parent: str | None, virtual: int
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nibble",
        "root": root,
        "parent": parent,
        "max_model_len": serving.engine.max_model_len - virtual,
    }
