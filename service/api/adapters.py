"""Adapters over HTTP: upload, list, show, alias, load, pin, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from adapters import evaluation, origin
from adapters.errors import AdapterNotFound
from adapters.manifest import AdapterManifest, MergedDtype, Placement
from adapters.store import AdapterDescription
from adapters.traffic import MAX_ARMS
from service.api.access import Guarded, needs
from service.api.deps import DeskDep, Serving, ServingDep
from service.api.paging import MAX_PAGE, After, HasMore, Limit, Search, listed, pieces
from service.api.upload import Upload, received
from service.api.wire import Incoming, Outgoing, PathName, refusals
from service.engine.request import AdapterRef
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from service.residency.tiers import Resident

router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=Guarded)

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "config", "weights"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "maxLength": 64, "examples": ["support"]},
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_config.json, as PEFT writes it",
                        },
                        "weights": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_model.safetensors",
                        },
                        "template": {
                            "type": "string",
                            "description": "The adapter's own chat template (Jinja)",
                        },
                        "tokenizer": {
                            "type": "string",
                            "format": "binary",
                            "description": "tokenizer.json, of an adapter with new tokens",
                        },
                        "evaluation": {
                            "type": "string",
                            "format": "binary",
                            "description": "evaluation.json, kept with the version's provenance",
                        },
                        "training": {
                            "type": "string",
                            "format": "binary",
                            "description": "training.json, kept with the version's provenance",
                        },
                        "placement": {"type": "string", "enum": list(get_args(Placement))},
                        "merged_dtype": {"type": "string", "enum": list(get_args(MergedDtype))},
                    },
                }
            }
        },
    }
}


_TIERS = ("slot", "host", "loading", "store")  # the nearest first
ResidentQuery = Annotated[
    Literal["true", "false", "slot", "host", "loading", "store"] | None,
    Query(description="Only those in this tier; true: in memory or on its way there."),
]


class ResidencyView(Outgoing):
    """Where an adapter is now, besides the store, or that it is on its way."""

    tier: Literal["slot", "host", "loading"]
    placement: str
    merged_dtype: str = Field(description="Of the private weights; empty when unmerged.")
    bytes: int
    pinned: bool
    running: int = Field(description="Sequences that use it at this moment.")
    hits: int
    last_used: float = Field(description="Seconds since the epoch.")


class AdapterView(Outgoing):
    """One version of one adapter."""

    name: str
    version: int
    digest: str
    kind: str
    rank: int
    targets: list[str]
    parameters: int
    memory_bytes: int = Field(
        description="Of its numbers in fp32, as precision exact keeps them. The fast precision "
        "and merged placements keep others: `bytes` of `residency` is what it takes here."
    )
    weights_bytes: int
    placement: str
    merged_dtype: str
    template: bool = Field(description="Whether it brings a chat template of its own.")
    tokenizer: bool = Field(description="Whether it reads and writes with a tokenizer of its own.")
    vocabulary: int = Field(description="Rows of its tables; 0: as many as the base's.")
    base_fingerprint: str
    created: str
    tier: Literal["slot", "host", "loading", "store"] = Field(
        description="The nearest place where it is: on the device, in memory, on its way, on disk."
    )
    hits: int = Field(description="Requests' sequences that used it since the server started.")
    last_used: float | None = Field(description="Seconds since the epoch; null: not yet.")
    residency: list[ResidencyView]


class VersionView(Outgoing):
    version: int
    digest: str
    created: str


class ShareView(Outgoing):
    """One version behind an alias, and its share of the requests."""

    version: int
    weight: float
    digest: str


class AdapterDescriptionView(AdapterView):
    """One adapter with all that is known under its name."""

    versions: list[VersionView]
    aliases: dict[str, int | list[ShareView]] = Field(
        description="The version that each alias points to; several where it shares its traffic."
    )
    provenance: dict[str, Any] = Field(description="How this version came about.")


class AdapterList(Outgoing):
    adapters: list[AdapterView]
    has_more: HasMore


class AliasDropped(Outgoing):
    name: str
    alias: str


class Deleted(Outgoing):
    deleted: list[VersionView]


class Share(Incoming):
    """A version, or the digest of one, and its share beside the others': 90 and 10, or 0.9 and
    0.1. A share of 0 keeps a version at hand and sends it nothing."""

    version: int | None = Field(default=None, ge=1, le=999_999_999)
    digest: str | None = Field(default=None, pattern=r"^(sha256:)?[0-9a-f]{64}$")
    weight: float = Field(ge=0, le=1e6)


class AliasBody(Incoming):
    """What an alias points to: a version, the digest of one, or several that share its traffic."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"version": 1}, {"split": [{"version": 1, "weight": 100}]}]}
    )

    version: int | None = Field(default=None, ge=1, le=999_999_999)
    digest: str | None = Field(default=None, pattern=r"^(sha256:)?[0-9a-f]{64}$")
    split: list[Share] | None = Field(default=None, min_length=1, max_length=MAX_ARMS)


class AliasView(Outgoing):
    name: str
    alias: str
    version: int = Field(description="Of the largest share.")
    digest: str
    split: list[ShareView] | None = Field(default=None, description="Where it shares its traffic.")


class LoadView(Outgoing):
    """What bringing an adapter to its slot cost."""

    name: str
    version: int
    digest: str
    placement: str
    bytes: int
    seconds: float
    requantisation_error: float | None = Field(
        description="Relative error of merging into NF4; null where nothing was requantised."
    )
    notes: dict[str, float]


class PinView(Outgoing):
    name: str
    digest: str
    pinned: bool


@router.post(
    "",
    status_code=201,
    openapi_extra=_FORM,
    responses={201: {"model": AdapterView}, **refusals(408, 413, 415, 422, 429, 503, 507)},
)
@needs("adapters:write")
async def upload(request: Request, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Upload an adapter. A name that exists gets a new version; old ones stay addressable.

    The reply means: checked against this base, complete, and safe on the disk.
    """
    tenant = serving.caller.tenant
    desk.admission.check()
    desk.places.check(tenant)
    with desk.spool.arriving(request, tenant) as arriving:
        async with (
            received(arriving, desk.upload_directory, serving.limits) as arrived,
            desk.place(tenant, arriving),
        ):
            # The commit is not undone when the client goes now: it may have seen nothing, but a
            # repetition of the same upload finds the same version.
            manifest = await desk.slowly(_add, arrived, serving)
    return created(manifest)


@router.get("", responses={200: {"model": AdapterList}, **refusals(422, 503)})
@needs("adapters:read")
async def list_adapters(
    serving: ServingDep,
    resident: ResidentQuery = None,
    limit: Limit = None,
    after: After = "",
    search: Search = "",
) -> Response:
    """The newest version of every adapter by name, and where each is now."""
    residents = _by_digest(await asyncio.to_thread(serving.engine.residents))
    near = residents if resident not in (None, "false", "store") else None
    among = near if near is not None and len(near) <= MAX_PAGE else None

    def views() -> Iterator[Sequence[dict[str, Any]]]:
        read = partial(serving.store.page, digests=among, search=search.lower())
        for manifests in pieces(read, after, lambda one: one.name):
            found = (_view(one, residents.get(one.digest, ())) for one in manifests)
            yield [view for view in found if _wanted(view["tier"], resident)]

    return await listed(views(), limit, "adapters")


@router.get(
    "/{name}", responses={200: {"model": AdapterDescriptionView}, **refusals(404, 422, 503)}
)
@needs("adapters:read")
async def show(name: PathName, serving: ServingDep) -> JSONResponse:
    """One adapter by `name`, `name@version`, `name@alias` or `sha256:<digest>`."""
    manifest = await asyncio.to_thread(serving.store.resolve, name)
    described = await asyncio.to_thread(serving.store.describe, manifest.name)
    residents = await asyncio.to_thread(serving.engine.residents, manifest.digest)
    body = _view(manifest, residents) | {
        "versions": [_version(one) for one in described.versions],
        "aliases": _aliases(described),
        "provenance": dict(manifest.provenance),
    }
    return _reply(body, 200, manifest)


@router.delete("/{name}", responses={200: {"model": Deleted}, **refusals(404, 409, 422, 503)})
@needs("adapters:write")
async def delete(name: PathName, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Delete `name` with all versions, or `name@version`. What runs on it finishes first; when
    the reply comes, nothing of it is left in slots or caches."""
    gone = await desk.slowly(delete_adapter, name, serving)
    return JSONResponse({"deleted": [_version(one) for one in gone]})


@router.put(
    "/{name}/aliases/{alias}", responses={200: {"model": AliasView}, **refusals(404, 422, 503)}
)
@needs("adapters:write")
async def set_alias(
    name: PathName, alias: PathName, body: AliasBody, serving: ServingDep
) -> JSONResponse:
    """Point `name@alias` to a version of the adapter, or share its requests among several.

    Requests that run are not touched. A client that gives a `client_key` stays at one version; a
    change of weights moves only clients to versions whose share grew.
    """
    shares = await asyncio.to_thread(_shares, name, body, serving)
    weights = {one.version: weight for one, weight in shares}
    await asyncio.to_thread(serving.store.set_alias, name, alias, weights)
    target = max(shares, key=lambda share: share[1])[0]
    split = [_share(one.version, weight, one.digest) for one, weight in shares]
    body_of_reply = {
        "name": name,
        "alias": alias,
        "version": target.version,
        "digest": target.digest,
    }
    return _reply(body_of_reply | ({"split": split} if body.split else {}), 200, target)


@router.delete(
    "/{name}/aliases/{alias}", responses={200: {"model": AliasDropped}, **refusals(404, 422, 503)}
)
@needs("adapters:write")
async def drop_alias(name: PathName, alias: PathName, serving: ServingDep) -> JSONResponse:
    """Take an alias away, and the figures of its experiment; the versions stay."""
    await asyncio.to_thread(serving.store.drop_alias, name, alias)
    return JSONResponse({"name": name, "alias": alias})


@router.post("/{name}/load", responses={200: {"model": LoadView}, **refusals(404, 422, 500, 503)})
@needs("adapters:write")
async def load(name: PathName, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Bring an adapter to its slot now, so that no request has to wait for it."""
    manifest = await asyncio.to_thread(serving.store.resolve, name)
    report = await desk.slowly(serving.engine.load, AdapterRef.of(manifest, serving.caller.tenant))
    body = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "placement": report.placement,
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 6),
        "requantisation_error": report.notes.get("requantisation_error"),
        "notes": dict(report.notes),
    }
    return _reply(body, 200, manifest)


@router.post("/{name}/pin", responses={200: {"model": PinView}, **refusals(404, 422, 500, 503)})
@needs("admin")
async def pin(name: PathName, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Load an adapter and keep it in its slot, whatever else comes."""
    manifest = await asyncio.to_thread(serving.store.resolve, name)
    await desk.slowly(serving.engine.pin, AdapterRef.of(manifest, serving.caller.tenant))
    return _reply(_pinned(manifest, True), 200, manifest)


@router.post("/{name}/unpin", responses={200: {"model": PinView}, **refusals(404, 422, 503)})
@needs("admin")
async def unpin(name: PathName, serving: ServingDep) -> JSONResponse:
    """Let the slot of an adapter be given away again, when another needs the place."""
    manifest = await asyncio.to_thread(serving.store.resolve, name)
    await asyncio.to_thread(_unpin, manifest, serving)
    return _reply(_pinned(manifest, False), 200, manifest)


def created(manifest: AdapterManifest) -> JSONResponse:
    """The reply to what made a new version."""
    return _reply(_view(manifest, []), 201, manifest)


def _add(arrived: Upload, serving: Serving) -> AdapterManifest:
    told = arrived.fields.get(origin.KEY)
    provenance = origin.checked(told) if told else {}
    if measured := arrived.fields.get(evaluation.KEY):
        provenance[evaluation.KEY] = evaluation.checked(measured)
    return serving.store.add(
        arrived.text("name") or "",
        arrived.fields["config"],
        arrived.weights,
        arrived.text("template"),
        serving.spec,
        serving.limits,
        placement=_one_of(arrived, "placement", get_args(Placement), "unmerged"),
        merged_dtype=_one_of(arrived, "merged_dtype", get_args(MergedDtype), "bfloat16"),
        provenance=provenance,
        probe=serving.probe,
        tokens=replace(serving.assembly.tokens, own=arrived.fields.get("tokenizer")),
    )


def _one_of(arrived: Upload, name: str, allowed: Sequence[str], default: str) -> Any:
    value = arrived.text(name)
    if value is None:
        return default
    if value not in allowed:
        raise InvalidRequest(f"{name} is {value[:80]!r}; it can be {', '.join(allowed)}", name)
    return value


def delete_adapter(name: str, serving: Serving) -> Sequence[AdapterManifest]:
    """Delete the rows; when all that was accepted before has ended, free slots and blocks of every
    digest that no row names any more; then remove the weights."""
    gone = serving.store.retire(name)
    serving.said["digests"] = [one.digest for one in gone]
    for one in {AdapterRef.of(manifest): manifest for manifest in gone}.values():
        try:
            other = serving.store.living(one.digest)
        except AdapterNotFound:
            serving.engine.forget(one.digest)
            for composed in serving.sums.of(one.digest):
                serving.engine.forget(composed)
        else:
            if AdapterRef.of(other).key != AdapterRef.of(one).key:
                _unpin(one, serving)
    serving.store.discard(gone)
    return gone


def _unpin(manifest: AdapterManifest, serving: Serving) -> None:
    with suppress(KeyError):  # it has no slot: nothing is pinned
        serving.engine.unpin(AdapterRef.of(manifest))


def _shares(name: str, body: AliasBody, serving: Serving) -> list[tuple[AdapterManifest, float]]:
    """The versions that an alias is to point to, each with its weight."""
    if sum(given is not None for given in (body.version, body.digest, body.split)) != 1:
        raise InvalidRequest("give either version, digest or split", "version")
    versions = serving.store.describe(name).versions
    if body.split is None:
        return [(_target(name, body.version, body.digest, versions, "version"), 1.0)]
    found: dict[int, tuple[AdapterManifest, float]] = {}
    for place, share in enumerate(body.split):
        where = f"split.{place}"
        one = _target(name, share.version, share.digest, versions, f"{where}.version")
        if one.version in found:
            raise InvalidRequest(f"version {one.version} is there twice", where)
        found[one.version] = (one, share.weight)
    if not any(weight for _, weight in found.values()):
        raise InvalidRequest("all weights are 0: one must be more", "split")
    return list(found.values())


def _target(
    name: str,
    version: int | None,
    digest: str | None,
    versions: Sequence[AdapterManifest],
    where: str,
) -> AdapterManifest:
    if (version is None) == (digest is None):
        raise InvalidRequest("give either version or digest", where)
    for one in versions:
        if one.version == version or one.digest == (digest or "").removeprefix("sha256:"):
            return one
    raise AdapterNotFound(f"{name}@{version or digest}")


def _aliases(described: AdapterDescription) -> dict[str, Any]:
    digests = {one.version: one.digest for one in described.versions}
    return {
        alias: next(iter(arms))
        if len(arms) == 1
        else [_share(version, weight, digests[version]) for version, weight in arms.items()]
        for alias, arms in described.aliases.items()
    }


def _share(version: int, weight: float, digest: str) -> dict[str, Any]:
    return {"version": version, "weight": weight, "digest": digest}


def _reply(body: dict[str, Any], status: int, manifest: AdapterManifest) -> JSONResponse:
    return JSONResponse(body, status, {"x-adapter-digest": manifest.digest})


def _by_digest(residents: Sequence[Resident]) -> dict[str, list[Resident]]:
    found: dict[str, list[Resident]] = {}
    for one in residents:
        found.setdefault(one.digest, []).append(one)
    return found


def _wanted(tier: str, resident: str | None) -> bool:
    if resident in (None, tier):
        return True
    return resident in ("true", "false") and (tier != "store") == (resident == "true")


def _view(manifest: AdapterManifest, residents: Sequence[Resident]) -> dict[str, Any]:
    mine = [one for one in residents if one.digest == manifest.digest]
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "kind": manifest.kind,
        "rank": manifest.rank,
        "targets": list(manifest.targets),
        "parameters": manifest.memory_bytes // 4,
        "memory_bytes": manifest.memory_bytes,
        "weights_bytes": manifest.weights_bytes,
        "placement": manifest.placement,
        "merged_dtype": manifest.merged_dtype,
        "template": manifest.template is not None,
        "tokenizer": manifest.tokenizer_sha256 is not None,
        "vocabulary": manifest.vocabulary,
        "base_fingerprint": manifest.base_fingerprint,
        "created": manifest.created,
        "tier": min((one.tier for one in mine), key=_TIERS.index, default="store"),
        "hits": sum(one.hits for one in mine),
        "last_used": max((one.last_used for one in mine), default=0.0) or None,
        "residency": [_residency(one) for one in mine if one.tier != "store"],
    }


def _residency(one: Resident) -> dict[str, Any]:
    return {
        "tier": one.tier,
        "placement": one.placement,
        "merged_dtype": one.merged_dtype,
        "bytes": one.nbytes,
        "pinned": one.pinned,
        "running": one.running,
        "hits": one.hits,
        "last_used": one.last_used,
    }


def _version(manifest: AdapterManifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "digest": manifest.digest,
        "created": manifest.created,
    }


def _pinned(manifest: AdapterManifest, value: bool) -> dict[str, Any]:
    return {"name": manifest.name, "digest": manifest.digest, "pinned": value}
