"""A batch on its way into a collection: worked off in a thread, told in the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from service.api.deps import Desk, Serving
from service.api.document_upload import DocumentUpload
from service.errors import InvalidRequest
from service.retrieval.collection import Collection
from service.retrieval.errors import DocumentRefused
from service.retrieval.fields import FieldType, check_metadata
from service.retrieval.ingest import Added, Embedding, Event, Refused, Unchanged, ingest
from service.retrieval.parsing import Source, format_of, parse
from service.retrieval.passage import Document

Json = dict[str, Any]
MAX_ID = 512
Documents = Iterable[Document | DocumentRefused]


def documents_of_body(
    rows: Sequence[tuple[str, str, Mapping[str, Any]]], fields: Mapping[str, FieldType]
) -> list[Document | DocumentRefused]:
    """Documents of a JSON body. Raises InvalidRequest where metadata does not fit the fields."""
    return [
        Document(name, text, check_metadata(metadata, fields, f"documents.{number}.metadata"))
        for number, (name, text, metadata) in enumerate(rows)
    ]


def documents_of_files(
    upload: DocumentUpload, fields: Mapping[str, FieldType]
) -> Iterator[Document | DocumentRefused]:
    """Documents of files that arrived, read in a child as they are asked for.

    Raises InvalidRequest where the metadata for all files does not fit the fields.
    """
    return _read(upload, check_metadata(upload.metadata, fields), fields)


def _read(
    upload: DocumentUpload, shared: Mapping[str, Any], fields: Mapping[str, FieldType]
) -> Iterator[Document | DocumentRefused]:
    sources: list[Source] = []
    for name, path in upload.files:
        try:
            sources.append(Source(name, path, format_of(name)))
        except DocumentRefused as error:
            yield error
    for found in parse(sources):
        if isinstance(found, DocumentRefused):
            yield found
            continue
        for one in found:
            try:
                if len(one.id) > MAX_ID:
                    raise InvalidRequest(f"an id of more than {MAX_ID} characters", "id")
                own = check_metadata(one.metadata, fields)
                yield Document(one.id, one.text, {**shared, **own})
            except InvalidRequest as error:
                yield DocumentRefused(one.id, f"{error.field}: {error}")


class Ingestion:
    """Iterate `events` once, then ask for the `result`; `close` whatever happens."""

    def __init__(
        self,
        collection: Collection,
        documents: Documents,
        serving: Serving,
        desk: Desk,
        release: Callable[[], None],
    ) -> None:
        """`release` is called once, when nothing works on the batch any more."""
        self._events = ingest(
            collection, documents, serving.library.chunker, serving.library.embedder
        )
        self._desk = desk
        self._release = release
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._added: list[str] = []
        self._unchanged: list[str] = []
        self._refused: list[Json] = []
        self._chunks = 0
        self._reused = 0
        self._running = False

    async def events(self) -> AsyncIterator[Json]:
        """Each event as JSON, the result with the last. Raises what stopped the batch."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        self._running = True

        def work() -> None:
            try:
                for event in self._events:
                    loop.call_soon_threadsafe(queue.put_nowait, self._note(event))
                    if self._stop.is_set():
                        break
                self._events.close()
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)
                loop.call_soon_threadsafe(self._release)

        working = asyncio.ensure_future(self._desk.slowly(work))
        working.add_done_callback(lambda _: queue.put_nowait(None))  # it may never have begun
        while (event := await queue.get()) is not None:
            yield event
        await working
        yield {"event": "done", "result": self.result()}

    def close(self) -> None:
        """Nobody listens any more: stop after the commit that is under way."""
        self._stop.set()
        if not self._running:
            self._running = True
            self._release()

    def result(self) -> Json:
        return {
            "added": self._added,
            "unchanged": self._unchanged,
            "refused": self._refused,
            "chunks": self._chunks,
            "reused": self._reused,
            "seconds": round(time.monotonic() - self._started, 3),
        }

    def _note(self, event: Event) -> Json:
        if isinstance(event, Added):
            self._added += event.documents
            self._chunks += event.chunks
            self._reused += event.reused
            names = list(event.documents)
            return {
                "event": "added",
                "documents": names,
                "chunks": event.chunks,
                "reused": event.reused,
            }
        if isinstance(event, Unchanged):
            self._unchanged.append(event.document)
            return {"event": "unchanged", "document": event.document}
        if isinstance(event, Refused):
            self._refused.append({"document": event.document, "error": event.reason})
            return {"event": "refused", "document": event.document, "error": event.reason}
        assert isinstance(event, Embedding)
        return {"event": "embedding", "chunks": event.chunks, "of": event.of}
