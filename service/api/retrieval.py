"""What every skin offers of retrieval: the request's `retrieval`, and what a reply tells of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from service.api.deps import Serving
from service.api.wire import Incoming, Outgoing
from service.errors import InvalidRequest
from service.retrieval.fields import parse_filter
from service.retrieval.library import check_embedder
from service.retrieval.passage import Passage
from service.retrieval.search import MAX_K, MAX_QUESTION, Answer, Question, search

Json = dict[str, Any]
CollectionName = Annotated[str, Field(min_length=1, max_length=64)]


class SearchOptions(Incoming):
    """How to choose passages."""

    k: int = Field(default=4, ge=1, le=MAX_K, description="How many passages at most.")
    mode: Literal["dense", "lexical", "hybrid"] = Field(
        default="hybrid", description="By meaning, by words (BM25), or both fused by their ranks."
    )
    filter: Any = Field(
        default=None,
        description='On declared fields and on `document`: `{"year": {"gte": 2020}}`, '
        '`{"any": [{"language": "en"}, {"not": {"year": 2020}}]}`.',
    )
    min_score: float | None = Field(
        default=None,
        ge=-1e6,
        le=1e6,
        description="Leave out passages below it. Cosine for dense, BM25 for lexical, 0 to 1 for "
        "hybrid, where 1 is first in both rankings.",
    )
    diversity: float = Field(
        default=0.0, ge=0, le=1, description="More than 0: passages that say something else."
    )
    rerank: bool = Field(default=False, description="By the cross-encoder that the server names.")


class Retrieval(SearchOptions):
    """Passages of a collection for a prompt, before the question."""

    collection: CollectionName
    query: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_QUESTION,
        description="What to look for; when left out, the text or the last message of the user.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=16,
        le=1 << 20,
        description="Of the prompt, for passages; when left out, what the question and the output "
        "leave.",
    )


class PassageView(Outgoing):
    """A passage with its place: characters `start` to `stop` of the document's text."""

    document: str
    heading: str
    start: int
    stop: int
    score: float
    dense: float | None = Field(default=None, description="Cosine similarity.")
    lexical: float | None = Field(default=None, description="BM25.")
    rerank: float | None = None
    tokens: int
    text: str
    metadata: dict[str, Any]


class Citation(Outgoing):
    """A passage in the prompt, by the number that stands before it there."""

    number: int
    document: str
    heading: str
    start: int
    stop: int
    score: float
    tokens: int


class Dropped(Outgoing):
    """A passage that was found and had no room in the prompt."""

    document: str
    heading: str
    start: int
    stop: int
    score: float
    tokens: int


class RetrievalDetails(Outgoing):
    """What was retrieved for a prompt."""

    collection: str
    mode: str
    citations: list[Citation]
    dropped: list[Dropped] = Field(description="Found, and left out for want of room.")
    passage_tokens: int = Field(description="Of the prompt's tokens, those that passages added.")
    timings: dict[str, float] = Field(description="Seconds of each step.")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request's `retrieval`, and whose collections it means."""

    body: Retrieval
    tenant: str


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What came of it, for the reply."""

    wanted: Wanted
    shown: Sequence[Passage]
    dropped: Sequence[Passage]
    tokens: int
    timings: Mapping[str, float]

    def told(self) -> Json:
        """`RetrievalDetails`."""
        return {
            "collection": self.wanted.body.collection,
            "mode": self.wanted.body.mode,
            "citations": [
                {"number": number} | _place(passage) for number, passage in enumerate(self.shown, 1)
            ],
            "dropped": [_place(passage) for passage in self.dropped],
            "passage_tokens": self.tokens,
            "timings": dict(self.timings),
        }


def passage_view(passage: Passage) -> Json:
    """`PassageView`."""
    scores = {
        "dense": passage.dense,
        "lexical": passage.lexical,
        "rerank": passage.rerank,
    }
    return (
        _place(passage)
        | {name: round(score, 6) for name, score in scores.items() if score is not None}
        | {"text": passage.text, "metadata": shown_metadata(passage.metadata)}
    )


def shown_metadata(metadata: Mapping[str, Any]) -> Json:
    """Metadata as JSON has it: dates as text."""
    return {
        name: value if isinstance(value, str | int | float | bool) else value.isoformat()
        for name, value in metadata.items()
    }


def _place(passage: Passage) -> Json:
    return {
        "document": passage.document,
        "heading": passage.heading,
        "start": passage.start,
        "stop": passage.stop,
        "score": round(passage.score, 6),
        "tokens": passage.tokens,
    }


async def found(
    name: str, options: SearchOptions, text: str, tenant: str, serving: Serving, where: str
) -> Answer:
    """Search a tenant's collection. `where` names the options in refusals."""
    started = time.perf_counter()
    answer = await asyncio.to_thread(_found, name, options, text, tenant, serving, where)
    answer.timings["total"] = round(time.perf_counter() - started, 6)
    return answer


def _found(
    name: str, options: SearchOptions, text: str, tenant: str, serving: Serving, where: str
) -> Answer:
    library = serving.library
    collection = library.shelf(tenant).collection(name)
    if options.mode != "lexical":
        check_embedder(collection, library.embedder, name)
    if options.rerank and serving.reranker is None:
        raise InvalidRequest(
            "this server has no reranker: leave it out, or set `reranker`", f"{where}rerank"
        )
    try:
        condition = parse_filter(options.filter, collection.character.fields)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), f"{where}{error.field}") from error
    question = Question(
        text,
        options.k,
        options.mode,
        condition,
        options.min_score,
        options.diversity,
        options.rerank,
    )
    return search(collection, question, library.embedder, serving.reranker)
