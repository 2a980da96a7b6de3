"""Collections of documents over HTTP: create, fill, search, change, delete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, field_validator

from service.api.access import Guarded, needs
from service.api.deps import Desk, DeskDep, Serving, ServingDep, TenantDep, unless_gone
from service.api.document_upload import FORM, received
from service.api.errors import failure
from service.api.ingestion import Ingestion, documents_of_body, documents_of_files
from service.api.paging import MAX_PAGE, After, HasMore, Limit, Search, listed
from service.api.retrieval import (
    CollectionName,
    PassageView,
    SearchOptions,
    found,
    passage_view,
    shown_metadata,
)
from service.api.sse import EventReply, events_of
from service.api.wire import Incoming, Outgoing, refusals
from service.retrieval.chunks import DEFAULT_TOKENS, MAX_TOKENS, MIN_TOKENS
from service.retrieval.collection import Collection, Stored
from service.retrieval.errors import CollectionNotFound, DocumentNotFound
from service.retrieval.fields import MAX_FIELDS
from service.retrieval.library import Shelf
from service.retrieval.search import MAX_QUESTION

router = APIRouter(prefix="/collections", tags=["collections"], route_class=Guarded)

DOCUMENTS = re.compile(r"/collections/[^/]+/(documents|files)")  # bodies that bring documents
MAX_DOCUMENTS = 10_000  # of one request
MAX_ID = 512
InPath = Annotated[str, Path(min_length=1, max_length=64, examples=["handbook"])]
DocumentPath = Annotated[str, Path(min_length=1, max_length=MAX_ID, examples=["guide.md"])]
_ERRORS = refusals(404, 422, 501, 503)
_WRITE_ERRORS = refusals(404, 408, 409, 413, 415, 422, 429, 501, 503, 507)


class CollectionBody(Incoming):
    """A new collection, for the embedding model that the server has now."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "handbook", "fields": {"year": "integer", "language": "string"}}]
        }
    )

    name: CollectionName = Field(description="Small letters, digits, - and _.")
    description: str = Field(default="", max_length=1024)
    fields: dict[str, str] = Field(
        default_factory=dict,
        max_length=MAX_FIELDS,
        description="Metadata that documents may have and filters may ask for: string, integer, "
        "number, boolean or date.",
    )
    language: str = Field(default="English", max_length=40, description="Of stemming, stop words.")
    chunk_tokens: int = Field(
        default=DEFAULT_TOKENS,
        ge=MIN_TOKENS,
        le=MAX_TOKENS,
        description="Longest passage, in the base's tokens.",
    )
    chunk_overlap: int = Field(default=0, ge=0, le=MAX_TOKENS, description="Tokens that repeat.")


class CollectionView(Outgoing):
    """One collection."""

    name: str
    description: str
    fields: dict[str, str]
    language: str
    chunk_tokens: int
    chunk_overlap: int
    embedder: str = Field(description="The model whose vectors it has; no other may add to it.")
    dimensions: int
    created: str
    documents: int
    chunks: int
    bytes: int = Field(description="What it takes, indexes too, as the tenant's quota counts it.")


class CollectionList(Outgoing):
    collections: list[CollectionView]
    has_more: HasMore


class CollectionDeleted(Outgoing):
    deleted: str


class DocumentBody(Incoming):
    """One document. The id is yours; the same id again replaces the whole document."""

    id: str = Field(min_length=1, max_length=MAX_ID)
    text: str = Field(min_length=1, description="Plain text or Markdown.")
    metadata: dict[str, Any] = Field(default_factory=dict, max_length=MAX_FIELDS)


class DocumentsBody(Incoming):
    """A batch of documents."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"documents": [{"id": "merla", "text": "Merla lives in Tovan."}]}]
        }
    )

    documents: list[DocumentBody] = Field(min_length=1, max_length=MAX_DOCUMENTS)

    @field_validator("documents")
    @classmethod
    def _each_once(cls, documents: list[DocumentBody]) -> list[DocumentBody]:
        """Each would replace the one before, in a commit of its own."""
        first: dict[str, int] = {}
        for place, document in enumerate(documents):
            if first.setdefault(document.id, place) != place:
                raise ValueError(
                    f"documents {first[document.id]} and {place} (from 0) have one id; send the "
                    "one that counts"
                )
        return documents


class RefusedDocument(Outgoing):
    document: str
    error: str


class Ingested(Outgoing):
    """What came of a batch. Documents that are added or unchanged are on the disk."""

    added: list[str]
    unchanged: list[str]
    refused: list[RefusedDocument]
    chunks: int = Field(description="Of the added documents.")
    reused: int = Field(description="Chunks whose text the collection had embedded before.")
    seconds: float


class IngestEvent(Outgoing):
    """One event of a batch with `Accept: text/event-stream`."""

    event: Literal["embedding", "added", "unchanged", "refused", "done"]
    documents: list[str] | None = Field(default=None, description="Durable from now on.")
    document: str | None = None
    error: str | None = None
    chunks: int | None = None
    of: int | None = Field(default=None, description="Chunks that this commit embeds.")
    reused: int | None = None
    result: Ingested | None = Field(default=None, description="With the last event.")


class DocumentView(Outgoing):
    """A document as the collection has it."""

    id: str
    digest: str
    chunks: int
    characters: int
    metadata: dict[str, Any]


class DocumentList(Outgoing):
    documents: list[DocumentView]
    total: int


class DocumentDescription(DocumentView):
    """With its passages, in order."""

    passages: list[PassageView]


class DocumentDeleted(Outgoing):
    deleted: str


class SearchBody(SearchOptions):
    """A question to a collection."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "Where does Merla live?"}]})

    query: str = Field(min_length=1, max_length=MAX_QUESTION)


class SearchReply(Outgoing):
    passages: list[PassageView] = Field(description="The best first.")
    timings: dict[str, float] = Field(description="Seconds of each step.")


@router.post("", status_code=201, responses={201: {"model": CollectionView}, **_WRITE_ERRORS})
@needs("rag")
async def create(
    body: CollectionBody, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> JSONResponse:
    """Create an empty collection."""

    def make() -> dict[str, Any]:
        made = serving.library.shelf(tenant).create(
            body.name,
            fields=body.fields,
            description=body.description,
            language=body.language,
            chunk_tokens=body.chunk_tokens,
            chunk_overlap=body.chunk_overlap,
        )
        return _view(body.name, made)

    return JSONResponse(await desk.slowly(make), 201)


@router.get("", responses={200: {"model": CollectionList}, **_ERRORS})
@needs("rag")
async def list_collections(
    serving: ServingDep,
    tenant: TenantDep,
    limit: Limit = None,
    after: After = "",
    search: Search = "",
) -> Response:
    """All collections by name."""

    def views() -> Iterator[list[dict[str, Any]]]:
        shelf = serving.library.shelf(tenant)
        for name in shelf.names():
            if name > after and search.lower() in name:
                with suppress(CollectionNotFound):  # deleted meanwhile
                    yield [_view(name, shelf.collection(name))]

    return await listed(views(), limit, "collections")


@router.get("/{name}", responses={200: {"model": CollectionView}, **_ERRORS})
@needs("rag")
async def show(name: InPath, serving: ServingDep, tenant: TenantDep) -> JSONResponse:
    """One collection."""
    shelf = serving.library.shelf(tenant)
    return JSONResponse(await asyncio.to_thread(lambda: _view(name, shelf.collection(name))))


@router.delete("/{name}", responses={200: {"model": CollectionDeleted}, **_WRITE_ERRORS})
@needs("rag")
async def delete(
    name: InPath, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> JSONResponse:
    """Delete a collection with all its documents. The reply means that the files are gone."""
    await desk.slowly(serving.library.shelf(tenant).delete, name)
    return JSONResponse({"deleted": name})


@router.post(
    "/{name}/documents",
    responses={200: {"model": Ingested, "content": events_of(IngestEvent)}, **_WRITE_ERRORS},
)
@needs("rag")
async def add_documents(
    name: InPath,
    body: DocumentsBody,
    request: Request,
    desk: DeskDep,
    serving: ServingDep,
    tenant: TenantDep,
) -> Response:
    """Add documents, or replace those of the same ids, each as a whole.

    With `Accept: text/event-stream` the reply tells of each commit; who goes away keeps what was
    added until then.
    """
    collection = await _writable(name, desk, serving, tenant)
    rows = [(one.id, one.text, one.metadata) for one in body.documents]
    documents = documents_of_body(rows, collection.character.fields)
    place = await unless_gone(request, desk.places.take(tenant))
    release = partial(desk.places.give_back, place)
    return await _reply(Ingestion(collection, documents, serving, desk, release), request)


@router.post(
    "/{name}/files",
    responses={200: {"model": Ingested, "content": events_of(IngestEvent)}, **_WRITE_ERRORS},
    openapi_extra=FORM,
)
@needs("rag")
async def add_files(
    name: InPath, request: Request, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> Response:
    """Add files, each a document by its name: txt, md, html, pdf, docx, csv; of a jsonl file, each
    row, as `{"id", "text", "metadata"}`. Replies and events are those of /documents."""
    collection = await _writable(name, desk, serving, tenant)
    with ExitStack() as stack:
        arriving = stack.enter_context(desk.spool.arriving(request, tenant))
        upload = await received(arriving, desk.upload_directory)
        stack.callback(upload.remove)
        documents = documents_of_files(upload, collection.character.fields)
        place = await unless_gone(arriving, desk.places.take(tenant))
        stack.callback(desk.places.give_back, place)
        close = stack.pop_all().close  # when nothing works on them any more
    return await _reply(Ingestion(collection, documents, serving, desk, close), arriving)


@router.get("/{name}/documents", responses={200: {"model": DocumentList}, **_ERRORS})
@needs("rag")
async def list_documents(
    name: InPath,
    serving: ServingDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 1000,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> JSONResponse:
    """The documents of a collection, by id."""

    def look() -> tuple[list[Stored], int]:
        stored = list(serving.library.shelf(tenant).collection(name).stored().values())
        return stored[offset : offset + limit], len(stored)

    some, total = await asyncio.to_thread(look)
    return JSONResponse({"documents": [_document(one) for one in some], "total": total})


@router.get(
    "/{name}/documents/{document:path}", responses={200: {"model": DocumentDescription}, **_ERRORS}
)
@needs("rag")
async def show_document(
    name: InPath, document: DocumentPath, serving: ServingDep, tenant: TenantDep
) -> JSONResponse:
    """One document and its passages."""

    def look() -> dict[str, Any]:
        collection = serving.library.shelf(tenant).collection(name)
        passages = collection.passages(document)
        (stored,) = collection.stored([document]).values()
        return _document(stored) | {"passages": [passage_view(one) for one in passages]}

    return JSONResponse(await asyncio.to_thread(look))


@router.delete(
    "/{name}/documents/{document:path}",
    responses={200: {"model": DocumentDeleted}, **_WRITE_ERRORS},
)
@needs("rag")
async def delete_document(
    name: InPath, document: DocumentPath, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> JSONResponse:
    """Delete a document. The reply means that its text has left the disk."""

    def remove() -> None:
        if not serving.library.shelf(tenant).collection(name).remove([document]):
            raise DocumentNotFound(f"document {document[:80]!r} does not exist here")

    await desk.slowly(remove)
    return JSONResponse({"deleted": document})


@router.post("/{name}/search", responses={200: {"model": SearchReply}, **_WRITE_ERRORS})
@needs("rag")
async def search(
    name: InPath, body: SearchBody, serving: ServingDep, tenant: TenantDep
) -> JSONResponse:
    """The passages that answer a question best, without generating anything."""
    answer = await found(name, body, body.query, tenant, serving, "")
    shown = [passage_view(passage) for passage in answer.passages]
    return JSONResponse({"passages": shown, "timings": answer.timings})


async def _writable(name: str, desk: Desk, serving: Serving, tenant: str) -> Collection:
    desk.admission.check()
    desk.places.check(tenant)
    shelf: Shelf = serving.library.shelf(tenant)
    return await asyncio.to_thread(shelf.writable, name)


async def _reply(ingestion: Ingestion, request: Request) -> Response:
    events = ingestion.events()
    if "text/event-stream" in request.headers.get("accept", ""):
        return EventReply(_told(events, request.scope["request_id"]), ingestion.close, {})

    async def drained() -> dict[str, Any]:
        async for _ in events:
            pass
        return ingestion.result()

    try:
        return JSONResponse(await unless_gone(request, drained()))
    finally:
        ingestion.close()


async def _told(
    events: AsyncIterator[dict[str, Any]], request_id: str
) -> AsyncIterator[dict[str, Any]]:
    """An error after the first byte is an event too."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        yield failure(error).envelope(request_id)


def _view(name: str, collection: Collection) -> dict[str, Any]:
    documents, chunks = collection.count()
    size = {"documents": documents, "chunks": chunks, "bytes": collection.nbytes()}
    return {"name": name, **collection.character.told, **size}


def _document(stored: Stored) -> dict[str, Any]:
    return {
        "id": stored.id,
        "digest": stored.digest,
        "chunks": stored.chunks,
        "characters": stored.characters,
        "metadata": shown_metadata(stored.metadata),
    }
