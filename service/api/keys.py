"""API keys over HTTP, for operators: create, list, rotate, revoke."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from adapters.manifest import DEFAULT_TENANT
from service.access.caller import SCOPES, TENANT, Scope
from service.access.keys import DAY, MAX_DAYS, OVERLAP
from service.api.access import Guarded, needs
from service.api.deps import ServingDep
from service.api.wire import Incoming, Outgoing, PathName, refusals

router = APIRouter(prefix="/keys", tags=["admin"], route_class=Guarded)

TenantName = Annotated[str, Field(min_length=1, max_length=64, pattern=f"^{TENANT.pattern}$")]


class KeyBody(Incoming):
    """A key that is to be: what it may do, for whom, and for how long."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "chatbot", "scopes": ["infer"], "days": 90}]}
    )

    name: str = Field(min_length=1, max_length=64, description="For people; need not be unique.")
    tenant: TenantName = DEFAULT_TENANT
    scopes: list[Scope] = Field(min_length=1, max_length=len(SCOPES))
    days: float | None = Field(
        default=None, gt=0, le=MAX_DAYS, description="Until it expires; never, when left out."
    )


class RotateBody(Incoming):
    """How long both keys open."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_seconds": 3600.0}]})

    overlap_seconds: float = Field(default=OVERLAP, ge=0, le=365 * DAY)


class KeyView(Outgoing):
    """A key without its secret. Times are in seconds since the epoch."""

    id: str
    name: str
    tenant: str
    scopes: list[Scope]
    state: Literal["active", "expired", "revoked"]
    created: float
    expires: float | None
    revoked: float | None
    successor: str | None = Field(description="The key that it was rotated to.")


class NewKey(KeyView):
    """A new key."""

    key: str = Field(description="The whole key. It is shown this once, and kept nowhere.")


class KeyList(Outgoing):
    keys: list[KeyView]


_ERRORS = refusals(400, 404, 413, 415, 422, 503)


@router.post("", status_code=201, responses={201: {"model": NewKey}, **_ERRORS})
@needs("admin")
async def create(body: KeyBody, serving: ServingDep) -> JSONResponse:
    """A new API key. With the first one, the server begins to ask for keys."""
    keys = serving.gate.keys
    made = await asyncio.to_thread(keys.create, body.name, body.tenant, body.scopes, body.days)
    serving.said.update(made=made.key.id, whose=body.tenant, scopes=made.key.scopes)
    return JSONResponse(made.view(), 201, {"cache-control": "no-store"})


@router.get("", responses={200: {"model": KeyList}, **refusals(503)})
@needs("admin")
async def list_keys(serving: ServingDep) -> JSONResponse:
    """Every key that there ever was, of all tenants, oldest first."""
    found = await asyncio.to_thread(serving.gate.keys.list)
    return JSONResponse({"keys": [key.view() for key in found]})


@router.post("/{key_id}/rotate", status_code=201, responses={201: {"model": NewKey}, **_ERRORS})
@needs("admin")
async def rotate(key_id: PathName, body: RotateBody, serving: ServingDep) -> JSONResponse:
    """A new key in place of this one, which opens for a while more."""
    made = await asyncio.to_thread(serving.gate.keys.rotate, key_id, body.overlap_seconds)
    serving.said["made"] = made.key.id
    return JSONResponse(made.view(), 201, {"cache-control": "no-store"})


@router.delete("/{key_id}", responses={200: {"model": KeyView}, **refusals(400, 404, 422, 503)})
@needs("admin")
async def revoke(key_id: PathName, serving: ServingDep) -> JSONResponse:
    """From now on the key opens nothing: here at once, elsewhere within a second."""
    gone = await asyncio.to_thread(serving.gate.keys.revoke, key_id)
    serving.gate.forget(key_id)
    return JSONResponse(gone.view())
