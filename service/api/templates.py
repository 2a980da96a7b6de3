"""Prompt templates over HTTP: keep, show, compare, render, alias, delete."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from adapters.errors import InvalidChat
from adapters.prompts.shelf import MAX_REFERENCE, StoredTemplate, TemplateShelf
from adapters.prompts.template import (
    MAX_ADAPTER,
    MAX_DESCRIPTION,
    MAX_EXAMPLES,
    MAX_PART,
    MAX_STOPS,
    MAX_VARIABLES,
    parse_template,
)
from adapters.prompts.variables import MAX_ITEMS, MAX_LENGTH, MAX_NUMBER, MAX_VALUES
from service.api.access import Guarded, caller_of, needs
from service.api.deps import DeskDep, ServingDep, TenantDep
from service.api.generate import Inputs
from service.api.intake import client_key, preview, reader
from service.api.paging import After, HasMore, Limit, Search, listed, pieces
from service.api.retrieval import Retrieval, RetrievalDetails, Wanted
from service.api.templating import MAX_VERSION, Variables
from service.api.wire import (
    MAX_TOKENS,
    Count,
    Fraction,
    Incoming,
    Outgoing,
    Penalty,
    Reference,
    StopString,
    refusals,
)
from service.errors import InvalidRequest
from service.prompt.templates import TemplateAsked, Templates

router = APIRouter(prefix="/templates", tags=["templates"], route_class=Guarded)

Json = dict[str, Any]
Source = Annotated[str, Field(max_length=MAX_PART)]
Bound = Annotated[int | float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
InPath = Annotated[
    str, Path(min_length=1, max_length=MAX_REFERENCE, examples=["support", "support@prod"])
]
_ERRORS = refusals(404, 422, 503)
_WRITE_ERRORS = refusals(404, 408, 409, 413, 415, 422, 503, 507)


class ExampleBody(Incoming):
    user: Source
    assistant: Source


class VariableBody(Incoming):
    """What a variable may be. Bounds that its type does not have are refused."""

    type: Literal["string", "integer", "number", "boolean", "enum", "list"]
    required: bool | None = Field(default=None, description="When left out: if it has no default.")
    default: Any = None
    max_length: int | None = Field(
        default=None, ge=1, le=MAX_LENGTH, description="Characters, of each item of a list."
    )
    max_items: int | None = Field(default=None, ge=0, le=MAX_ITEMS)
    minimum: Bound | None = None
    maximum: Bound | None = None
    values: list[str] | None = Field(default=None, max_length=MAX_VALUES, description="Of an enum.")
    example: Any = Field(default=None, description="A value to try the template with.")
    description: str | None = None


class SamplingBody(Incoming):
    """Defaults for parameters of /generate that a request leaves out."""

    max_new_tokens: Count | None = None
    min_new_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0.01, le=100)
    top_k: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: Fraction | None = None
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: list[StopString] | None = Field(default=None, max_length=MAX_STOPS)


class TemplateBody(Incoming):
    """A template. Its parts are Jinja; `input` is what a request asks, `passages` the place of
    what retrieval finds, and everything else has to be among its variables."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "reader",
                    "variables": {"person": {"type": "string", "max_length": 40}},
                    "user": "{{ input }} Where does {{ person }} live?",
                    "sampling": {"max_new_tokens": 8},
                }
            ]
        }
    )

    name: str = Field(min_length=1, max_length=64, examples=["reader"])
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION)
    variables: dict[str, VariableBody] | None = Field(default=None, max_length=MAX_VARIABLES)
    system: Source | None = None
    examples: list[ExampleBody] | None = Field(default=None, max_length=MAX_EXAMPLES)
    user: Source
    assistant: Source | None = Field(default=None, description="How the answer begins.")
    sampling: SamplingBody | None = None
    adapter: str | None = Field(
        default=None, max_length=MAX_ADAPTER, description="For requests that name none."
    )


class TemplateView(Outgoing):
    """One version of a template."""

    name: str
    version: int
    digest: str = Field(description="sha-256 of the content.")
    created: str
    description: str = ""
    variables: dict[str, dict[str, Any]] = Field(default_factory=dict)
    system: str = ""
    examples: list[dict[str, str]] = Field(default_factory=list)
    user: str
    assistant: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict)
    adapter: str | None = None


class TemplateVersionView(Outgoing):
    version: int
    digest: str
    created: str


class TemplateDescriptionView(TemplateView):
    """One version with all that is known under its name."""

    versions: list[TemplateVersionView]
    aliases: dict[str, int]
    yaml: str = Field(description="The definition as a file has it.")


class TemplateList(Outgoing):
    templates: list[TemplateView]
    has_more: HasMore


class TemplateVersions(Outgoing):
    name: str
    versions: list[TemplateVersionView]
    aliases: dict[str, int]


class TemplateDiff(Outgoing):
    """What is different between two versions."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str
    from_: int = Field(alias="from")
    to: int
    changed: list[str] = Field(description="Fields whose content differs.")
    diff: str = Field(description="Unified, of the two as YAML; empty where they are the same.")


class TemplateAliasBody(Incoming):
    """Where an alias is to point."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: int = Field(ge=1, le=MAX_VERSION)


class TemplateAliasView(Outgoing):
    name: str
    alias: str
    version: int


class TemplatesDeleted(Outgoing):
    deleted: list[str]


class RenderBody(Incoming):
    """What a request would bring, without generating anything."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": "Merla lives in Tovan.", "variables": {"person": "Merla"}}]
        }
    )

    version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    variables: Variables = Field(default_factory=dict)
    inputs: Inputs | None = None
    adapter_id: Reference | None = Field(
        default=None, description="Whose chat template and tokens; the template's when left out."
    )
    retrieval: Retrieval | None = Field(
        default=None, description="Find passages as a request would, and show them in their place."
    )


class RenderedMessage(Outgoing):
    role: str
    content: str


class Rendered(Outgoing):
    """The prompt as the model gets it."""

    name: str
    version: int
    digest: str
    adapter: str | None
    messages: list[RenderedMessage]
    retrieval: RetrievalDetails | None = Field(
        default=None, description="What was found, where `retrieval` asked for it."
    )
    text: str = Field(description="Through the chat template, control tokens and all.")
    token_ids: list[int]
    tokens: int = Field(description="How many token ids.")


@router.post("", status_code=201, responses={201: {"model": TemplateView}, **_WRITE_ERRORS})
@needs("adapters:write")
async def add(body: TemplateBody, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Keep a template as the next version of its name. It is parsed and tried first; the same
    content again, as the newest version's, is that version."""
    found = await desk.slowly(_add, body, serving.templates)
    where = f"/templates/{found.name}@{found.version}"
    return JSONResponse(view(found), 201, headers={"location": where})


def _add(body: TemplateBody, templates: Templates) -> StoredTemplate:
    template = parse_template(body.model_dump(exclude={"name"}, exclude_unset=True))
    templates.renderer.check(template)
    return templates.shelf.add(body.name, template)


@router.get("", responses={200: {"model": TemplateList}, **_ERRORS})
@needs("adapters:read")
async def list_templates(
    serving: ServingDep, limit: Limit = None, after: After = "", search: Search = ""
) -> Response:
    """The newest version of every template by name."""
    read = partial(serving.templates.shelf.page, search=search.lower())
    found = pieces(read, after, lambda one: one.name)
    return await listed(([view(one) for one in some] for some in found), limit, "templates")


@router.get("/{name}", responses={200: {"model": TemplateDescriptionView}, **_ERRORS})
@needs("adapters:read")
async def show(name: InPath, serving: ServingDep) -> JSONResponse:
    """One template: `name`, `name@version` or `name@alias`."""
    return JSONResponse(await asyncio.to_thread(_described, name, serving.templates.shelf))


@router.get("/{name}/versions", responses={200: {"model": TemplateVersions}, **_ERRORS})
@needs("adapters:read")
async def versions(name: InPath, serving: ServingDep) -> JSONResponse:
    """Every version of a name, oldest first, and its aliases."""
    shelf = serving.templates.shelf
    found = await asyncio.to_thread(lambda: (shelf.versions(name), shelf.aliases_of(name)))
    return JSONResponse({"name": name, "versions": _listed(found[0]), "aliases": found[1]})


@router.get("/{name}/diff", responses={200: {"model": TemplateDiff}, **_ERRORS})
@needs("adapters:read")
async def diff(
    name: InPath,
    serving: ServingDep,
    before: Annotated[
        int | None,
        Query(alias="from", ge=1, le=MAX_VERSION, description="By default the one before."),
    ] = None,
    after: Annotated[
        int | None, Query(alias="to", ge=1, le=MAX_VERSION, description="By default the newest.")
    ] = None,
) -> JSONResponse:
    """What is different between two versions of a name."""
    shelf = serving.templates.shelf
    one, other = await asyncio.to_thread(_pair, name, before, after, shelf)
    return JSONResponse(_difference(one, other))


@router.post("/{name}/render", responses={200: {"model": Rendered}, **_WRITE_ERRORS})
@needs("infer", "adapters:read")
async def render(
    name: InPath,
    body: RenderBody,
    request: Request,
    desk: DeskDep,
    serving: ServingDep,
    tenant: TenantDep,
) -> JSONResponse:
    """The exact text and token ids of a prompt, without generating anything. With `retrieval` the
    passages that a request would get are found, and stand where the template has a place for
    them."""
    wanted = Wanted(body.retrieval, tenant) if body.retrieval else None
    if wanted is not None:
        caller_of(request).check("infer", "rag")  # it shows what documents say
    messages: list[Json] = []
    if isinstance(body.inputs, str):
        messages = [{"role": "user", "content": body.inputs}]
    elif body.inputs is not None:
        messages = [{"role": m.role, "content": m.content} for m in body.inputs]
    asked = TemplateAsked(name, body.version, body.variables)
    passages = wanted is not None
    made = await serving.templates.chat(asked, messages, passages=passages, field="")
    adapter = body.adapter_id or made.stored.template.adapter
    selection, assembly = await reader(adapter, client_key(None, request), desk, serving)
    own = selection.template if selection else None
    shown: Sequence[Mapping[str, Any]] = made.messages
    try:
        if wanted is not None:
            here = replace(serving, assembly=assembly)
            shown, retrieval = await preview(made, messages, wanted, selection, here)
        text, ids = await assembly.rendered(list(map(dict, shown)), own, answer=made.answer)
    except InvalidChat as error:
        raise InvalidRequest(str(error), "template") from error
    found = made.stored
    return JSONResponse(
        {
            "name": found.name,
            "version": found.version,
            "digest": found.digest,
            "adapter": adapter,
            "messages": [{"role": m["role"], "content": m["content"]} for m in shown],
            "text": text,
            "token_ids": ids,
            "tokens": len(ids),
            **({"retrieval": retrieval.told()} if wanted is not None else {}),
        }
    )


@router.put(
    "/{name}/aliases/{alias}", responses={200: {"model": TemplateAliasView}, **_WRITE_ERRORS}
)
@needs("adapters:write")
async def set_alias(
    name: InPath, alias: InPath, body: TemplateAliasBody, serving: ServingDep
) -> JSONResponse:
    """Point `name@alias` to a version."""
    await asyncio.to_thread(serving.templates.shelf.set_alias, name, alias, body.version)
    return JSONResponse({"name": name, "alias": alias, "version": body.version})


@router.delete(
    "/{name}/aliases/{alias}", responses={200: {"model": TemplatesDeleted}, **_WRITE_ERRORS}
)
@needs("adapters:write")
async def drop_alias(name: InPath, alias: InPath, serving: ServingDep) -> JSONResponse:
    """Take an alias away."""
    await asyncio.to_thread(serving.templates.shelf.drop_alias, name, alias)
    return JSONResponse({"deleted": [f"{name}@{alias}"]})


@router.delete("/{name}", responses={200: {"model": TemplatesDeleted}, **_WRITE_ERRORS})
@needs("adapters:write")
async def remove(name: InPath, serving: ServingDep) -> JSONResponse:
    """Delete `name` with all its versions, or `name@version`. 409 while an alias points there, or
    an adapter was trained with it."""
    gone = await asyncio.to_thread(serving.templates.shelf.delete, name)
    return JSONResponse({"deleted": [str(one) for one in gone]})


def view(stored: StoredTemplate) -> Json:
    """`TemplateView`."""
    head = {"name": stored.name, "version": stored.version}
    return head | {"digest": stored.digest, "created": stored.created} | stored.template.plain()


def _described(reference: str, shelf: TemplateShelf) -> Json:
    found = shelf.get(reference)
    return view(found) | {
        "versions": _listed(shelf.versions(found.name)),
        "aliases": shelf.aliases_of(found.name),
        "yaml": found.template.as_yaml(),
    }


def _pair(
    name: str, before: int | None, after: int | None, shelf: TemplateShelf
) -> tuple[StoredTemplate, StoredTemplate]:
    other = shelf.get(name, after)
    if before is None:
        numbers = [one.version for one in shelf.versions(other.name)]
        before = max((one for one in numbers if one < other.version), default=other.version)
    return shelf.get(other.name, before), other


def _listed(found: Sequence[StoredTemplate]) -> list[Json]:
    return [{"version": one.version, "digest": one.digest, "created": one.created} for one in found]


def _difference(one: StoredTemplate, other: StoredTemplate) -> Json:
    before, after = one.template.plain(), other.template.plain()
    lines = difflib.unified_diff(
        one.template.as_yaml().splitlines(keepends=True),
        other.template.as_yaml().splitlines(keepends=True),
        str(one),
        str(other),
    )
    fields = dict.fromkeys((*before, *after))
    return {
        "name": one.name,
        "from": one.version,
        "to": other.version,
        "changed": [field for field in fields if before.get(field) != after.get(field)],
        "diff": "".join(lines),
    }
