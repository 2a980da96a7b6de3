"""A new adapter made of stored ones: `POST /adapters/{name}/compose`."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from adapters.compose import MAX_PARTS, MAX_WEIGHT, Part, Term, check_terms
from adapters.errors import InvalidAdapter
from adapters.manifest import AdapterManifest
from service.api.access import Guarded, needs
from service.api.adapters import AdapterView, created
from service.api.deps import Desk, DeskDep, Serving, ServingDep
from service.api.upload import PREFIX
from service.api.wire import Incoming, PathName, Reference, Seed, refusals
from service.errors import InvalidRequest

router = APIRouter(tags=["adapters"], route_class=Guarded)

Method = Literal[
    "concatenate",
    "svd",
    "linear",
    "magnitude_prune",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune_svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
]


class StoredPart(Incoming):
    """One adapter, and its weight."""

    adapter: Reference
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class ComposeBody(Incoming):
    """What to make a new LoRA of, and how: the methods of PEFT's `add_weighted_adapter`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"parts": [{"adapter": "cipher", "weight": 0.7}], "method": "svd", "rank": 2}
            ]
        }
    )

    parts: list[StoredPart] = Field(min_length=1, max_length=MAX_PARTS)
    method: Method = Field(
        default="concatenate",
        description="concatenate: the exact sum, its rank the sum of the ranks. svd: the best "
        "approximation of it of one rank. linear, magnitude_prune, ties, dare_linear, dare_ties: "
        "over the factors, which must have one rank; with _svd over whole deltas of any rank.",
    )
    density: float | None = Field(
        default=None, gt=0, le=1, description="Share of the numbers that pruning leaves."
    )
    rank: int | None = Field(
        default=None, ge=1, le=4096, description="Of the svd methods; the parts' largest if unset."
    )
    seed: Seed | None = Field(
        default=None, description="Of the dare methods; drawn, and kept with the adapter, if unset."
    )
    majority_sign: Literal["total", "frequency"] | None = Field(
        default=None, description="Of the ties methods: by size, or by count."
    )


@router.post(
    "/adapters/{name}/compose",
    status_code=201,
    responses={201: {"model": AdapterView}, **refusals(404, 413, 415, 422, 429, 500, 503, 507)},
)
@needs("adapters:write")
async def compose(
    name: PathName, body: ComposeBody, request: Request, desk: DeskDep, serving: ServingDep
) -> JSONResponse:
    """Make a new version of `name` of stored LoRAs. It takes the road of every upload: checked,
    tried, and safe on the disk when the reply comes; what it is made of is in its provenance."""
    desk.admission.check()
    desk.places.check(serving.caller.tenant)
    _check_options(body)
    async with desk.place(serving.caller.tenant, request):
        manifest = await desk.slowly(_compose, name, body, desk, serving)
    return created(manifest)


def _check_options(body: ComposeBody) -> None:
    """An option that the method would not read is a misunderstanding, not a default."""
    from adapters.compose_stored import PRUNING, RANDOM

    if body.method in PRUNING and body.density is None:
        raise InvalidRequest(
            f"{body.method} prunes: give the density that is left, such as 0.5", "density"
        )
    for field, reads in (
        ("density", body.method in PRUNING),
        ("seed", body.method in RANDOM),
        ("majority_sign", "ties" in body.method),
        ("rank", body.method.endswith("svd")),
    ):
        if not reads and getattr(body, field) is not None:
            raise InvalidRequest(f"{body.method} has no {field}; leave it out", field)


def _compose(name: str, body: ComposeBody, desk: Desk, serving: Serving) -> AdapterManifest:
    """In a worker thread: files to files, layer by layer."""
    from adapters.compose_stored import Composition, compose_stored

    store = serving.store
    terms = [Term(part.adapter, part.weight) for part in body.parts]
    parts = [_resolved(term, serving) for term in terms]
    try:
        check_terms(terms)
    except InvalidAdapter as error:
        raise InvalidRequest(error.reason, "parts") from error
    seed = secrets.randbits(32) if body.seed is None and "dare" in body.method else body.seed
    how = Composition(
        method=body.method,
        density=1.0 if body.density is None else body.density,
        rank=body.rank,
        seed=seed or 0,
        majority_sign=body.majority_sign or "total",
    )
    prefix = f"{PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=desk.upload_directory) as directory:
        sources = [(part, store.weights_path(part.manifest)) for part in parts]
        config, weights = compose_stored(
            sources, how, serving.spec, serving.limits, Path(directory)
        )
        return store.add(
            name,
            config,
            weights,
            _template(parts),
            serving.spec,
            serving.limits,
            provenance={"composed": _provenance(parts, body, seed)},
            probe=serving.probe,
        )


def _resolved(term: Term, serving: Serving) -> Part:
    return Part(serving.store.resolve(term.reference), term.weight)


def _template(parts: list[Part]) -> str | None:
    found = {part.manifest.template for part in parts}
    if len(found) > 1:
        raise InvalidRequest(
            "the parts bring different chat templates; compose adapters of one template", "parts"
        )
    return next(iter(found))


def _provenance(parts: list[Part], body: ComposeBody, seed: int | None) -> dict[str, Any]:
    options = body.model_dump(exclude={"parts", "method", "seed"}, exclude_none=True)
    return {
        "method": body.method,
        **options,
        **({} if seed is None else {"seed": seed}),
        "parts": [
            {
                "name": part.manifest.name,
                "version": part.manifest.version,
                "digest": part.manifest.digest,
                "weight": part.weight,
            }
            for part in parts
        ],
    }
