"""Tenants over HTTP, for operators: their quotas, and what one lets others read."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from adapters.sharing import Share, Shares
from adapters.sight import EVERYONE
from service.access.caller import TENANT
from service.access.quotas import Tenant, checked
from service.api.access import Guarded, needs
from service.api.deps import ServingDep
from service.api.wire import Incoming, Outgoing, PathName, refusals

router = APIRouter(prefix="/tenants", tags=["admin"], route_class=Guarded)

MOST = 1 << 50
Limit = Annotated[int, Field(ge=0, le=MOST)]
Audience = Annotated[str, Field(min_length=1, max_length=64, pattern=rf"^(\*|{TENANT.pattern})$")]


class QuotasBody(Incoming):
    """The limits of a tenant, in place of those before; what is left out, or 0, has none."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests_per_minute": 600, "tokens_per_minute": 100000}]}
    )

    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = Field(default=0, description="Of prompts and outputs.")
    concurrency: Limit = Field(default=0, description="Requests at the same time, on each server.")
    adapters: Limit = Field(default=0, description="Versions.")
    templates: Limit = Field(default=0, description="Versions.")
    bytes: Limit = Field(default=0, description="Of adapters, training files and collections.")
    train_minutes: Limit = Field(default=0, description="Of training in thirty days.")


class QuotasView(Outgoing):
    """The limits of a tenant; null: none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    adapters: int | None
    templates: int | None
    bytes: int | None
    train_minutes: int | None


class TenantView(Outgoing):
    """Who holds keys here."""

    name: str
    created: float = Field(description="Seconds since the epoch.")
    quotas: QuotasView


class TenantList(Outgoing):
    tenants: list[TenantView]


class ShareBody(Incoming):
    """Who else may read something, in place of those before; nobody: it is private again."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"audience": ["*"]}]})

    audience: list[Audience] = Field(max_length=1024, description="Tenants; `*`: all of them.")


class ShareView(Outgoing):
    """What a tenant lets others read, with all its versions and aliases."""

    kind: Literal["adapter", "template"]
    tenant: str
    name: str
    audience: list[str]


class ShareList(Outgoing):
    shares: list[ShareView]


_ERRORS = refusals(404, 413, 415, 422, 503)


@router.get("", responses={200: {"model": TenantList}, **refusals(503)})
@needs("admin")
async def list_tenants(serving: ServingDep) -> JSONResponse:
    """Every tenant that ever had a key, with its quotas."""
    found = await asyncio.to_thread(serving.meter.tenants.list)
    return JSONResponse({"tenants": [view(tenant) for tenant in found]})


@router.put("/{tenant}/quotas", responses={200: {"model": QuotasView}, **_ERRORS})
@needs("admin")
async def set_quotas(tenant: PathName, body: QuotasBody, serving: ServingDep) -> JSONResponse:
    """Limit what a tenant may use: here at once, on other servers within a second."""
    quotas = checked(body.model_dump())
    await asyncio.to_thread(serving.meter.tenants.set_quotas, tenant, quotas)
    serving.meter.forget(tenant)
    return JSONResponse(quotas.view())


@router.get("/shares", responses={200: {"model": ShareList}, **refusals(503)})
@needs("admin")
async def list_shares(serving: ServingDep) -> JSONResponse:
    """What tenants let others read."""
    found = await asyncio.to_thread(Shares(serving.store.catalog).list)
    return JSONResponse({"shares": [shown(share) for share in found]})


@router.put("/{tenant}/shares/{kind}/{name}", responses={200: {"model": ShareView}, **_ERRORS})
@needs("admin")
async def set_share(
    tenant: PathName,
    kind: Literal["adapter", "template"],
    name: PathName,
    body: ShareBody,
    serving: ServingDep,
) -> JSONResponse:
    """Let others read an adapter or a template of a tenant, and never write it. A tenant that has
    one of this name itself keeps to its own. All tenants have to be there: whoever got a key under
    a misspelt name one day would read what was meant for another."""
    readers = [one for one in body.audience if one != EVERYONE]
    audience = readers if len(readers) == len(body.audience) else [EVERYONE]
    share = Share(kind, tenant, name, tuple(dict.fromkeys(audience)))

    def put() -> None:
        serving.meter.tenants.check([tenant], "tenant")
        serving.meter.tenants.check(readers, "audience")
        Shares(serving.store.catalog).set(share)

    await asyncio.to_thread(put)
    return JSONResponse(shown(share))


def view(tenant: Tenant) -> dict[str, Any]:
    return {"name": tenant.name, "created": tenant.created, "quotas": tenant.quotas.view()}


def shown(share: Share) -> dict[str, Any]:
    return {
        "kind": share.kind,
        "tenant": share.tenant,
        "name": share.name,
        "audience": list(share.audience),
    }
