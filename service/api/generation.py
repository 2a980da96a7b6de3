"""From the engine's events to the text-generation skin's replies. No HTTP here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.prompts.shelf import StoredTemplate
from service.api.errors import failure
from service.api.retrieval import Retrieved
from service.api.templating import served_by
from service.engine.request import Event, Finished, Request, Token
from service.engine.stream import EventStream
from service.errors import Draining, ServiceError
from service.selection import Selection

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a reply has to know of its request."""

    request: Request
    selection: Selection | None
    best_of: bool
    details: bool
    prefix: str  # put before every output
    decode: Callable[[Sequence[int]], list[str]]
    retrieved: Retrieved | None = None
    template: StoredTemplate | None = None

    @property
    def adapter(self) -> Json | None:
        return described(self.selection) if self.selection else None

    def seed(self, end: Finished) -> int | None:
        return end.seed if self.request.sampling.do_sample else None

    def prefill(self, end: Finished) -> list[Json]:
        """The prompt's tokens with their log-probabilities, if they were asked for."""
        if not self.request.prompt_logprobs:
            return []
        prompt = self.request.prompt
        logprobs = (None, *end.prompt_logprobs)
        return [
            {"id": token, "text": text, "logprob": logprob}
            for token, text, logprob in zip(prompt, self.decode(prompt), logprobs, strict=True)
        ]


def described(selection: Selection) -> Json:
    """The adapter, or the sum of several, that serves a request."""
    if selection.single:
        found = selection.parts[0].manifest
        body = {
            "name": found.name,
            "version": found.version,
            "digest": found.digest,
            "placement": found.placement,
        }
        return body | ({"alias": selection.via.alias} if selection.via else {})
    parts = [
        {
            "name": part.manifest.name,
            "version": part.manifest.version,
            "digest": part.manifest.digest,
            "weight": part.weight,
        }
        for part in selection.parts
    ]
    ref = selection.ref
    return {
        "name": ref.name,
        "version": None,
        "digest": ref.digest,
        "placement": ref.placement,
        "parts": parts,
    }


@dataclass(slots=True)
class Outcome:
    """One sequence, collected."""

    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None

    @property
    def closed(self) -> Finished:
        assert self.end is not None, "the engine ends every sequence with Finished"
        return self.end

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


class Collector:
    """Takes the events of all sequences of one request."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.outcomes = [Outcome() for _ in range(origin.request.n)]

    def add(self, event: Event) -> None:
        """Raises the ServiceError of a sequence that did not end well."""
        outcome = self.outcomes[event.index]
        if isinstance(event, Token):
            outcome.tokens.append(event)
        else:
            check_end(event)
            outcome.end = event

    def ordered(self) -> list[Outcome]:
        """By index; with best_of, the most likely first."""
        if self.origin.best_of:
            return sorted(self.outcomes, key=lambda outcome: -outcome.likelihood)
        return self.outcomes


def check_end(end: Finished) -> None:
    """Raise what the client has to hear of an end that is not one of its own wishes."""
    if end.reason == "error":
        assert end.error is not None
        raise end.error
    if end.reason == "cancelled":
        raise Draining("the server stopped before this request was done")


def completion(collector: Collector) -> Json:
    """The body of /generate."""
    origin = collector.origin
    first, *others = collector.ordered()
    body: Json = {"generated_text": origin.prefix + first.closed.text}
    if origin.details:
        body["details"] = _sequence(origin, first, origin.prefill(first.closed)) | {
            "adapter": origin.adapter,
            "prompt_tokens": first.closed.prompt_tokens,
            "cached_tokens": first.closed.cached_tokens,
            "timings": _timings(first.closed),
        }
        body["details"] |= _speculation(origin, first.closed)
        if origin.retrieved is not None:
            body["details"]["retrieval"] = origin.retrieved.told()
        if origin.template is not None:
            body["details"]["template"] = served_by(origin.template)
        if others:
            body["details"]["best_of_sequences"] = [
                # The prompt is the same for all; its tokens are told once.
                {"generated_text": origin.prefix + other.closed.text}
                | _sequence(origin, other, prefill=[])
                for other in others
            ]
    if others and not origin.best_of:
        body["generations"] = [
            {
                "generated_text": origin.prefix + outcome.closed.text,
                "finish_reason": outcome.closed.reason,
                "generated_tokens": outcome.closed.generated_tokens,
                "seed": origin.seed(outcome.closed),
            }
            for outcome in (first, *others)
        ]
    return body


async def stream_events(
    stream: EventStream, origin: Origin, request_id: str
) -> AsyncIterator[Json]:
    """The events of /generate_stream; an error after the first byte is an event too."""
    counts = [0] * origin.request.n
    try:
        async for token, end in paired(stream):
            if end is not None:
                check_end(end)
            if token is not None:
                counts[token.index] += 1
                yield _event(origin, token, end, counts[token.index])
            else:
                assert end is not None
                yield _event(origin, _rest(end), end, counts[end.index])
    except ServiceError as error:
        yield failure(error).envelope(request_id)


async def paired(stream: EventStream) -> AsyncIterator[tuple[Token | None, Finished | None]]:
    """Tokens, the last one of each sequence together with its end, which follows it at once."""
    events = stream.__aiter__()
    async for event in events:
        if isinstance(event, Finished):
            yield None, event
        elif event.last:
            end = await anext(events)
            assert isinstance(end, Finished)
            yield event, end
        else:
            yield event, None


def _rest(end: Finished) -> Token:
    """A token of no text for an end that no token came with."""
    return Token(end.index, 0, end.tail, 0.0, special=True)


def _event(origin: Origin, token: Token, end: Finished | None, count: int) -> Json:
    body: Json = {"index": count, "token": _token(token)}
    if origin.request.n > 1:
        body["sequence"] = token.index
    if origin.request.sampling.top_logprobs:
        body["top_tokens"] = _top(token)
    body["generated_text"] = origin.prefix + end.text if end else None
    body["details"] = _stream_details(origin, end) if end else None
    return body


def _stream_details(origin: Origin, end: Finished) -> Json:
    details: Json = {
        "finish_reason": end.reason,
        "generated_tokens": end.generated_tokens,
        "input_length": end.prompt_tokens,
        "seed": origin.seed(end),
        "adapter": origin.adapter,
        "prompt_tokens": end.prompt_tokens,
        "cached_tokens": end.cached_tokens,
        "timings": _timings(end),
    }
    details |= _speculation(origin, end)
    if origin.request.prompt_logprobs:
        details["prefill"] = origin.prefill(end)
    if origin.retrieved is not None:
        details["retrieval"] = origin.retrieved.told()
    if origin.template is not None:
        details["template"] = served_by(origin.template)
    return details


def _sequence(origin: Origin, outcome: Outcome, prefill: list[Json]) -> Json:
    end = outcome.closed
    details: Json = {
        "finish_reason": end.reason,
        "generated_tokens": end.generated_tokens,
        "seed": origin.seed(end),
        "prefill": prefill,
        "tokens": [_token(token) for token in outcome.tokens],
    }
    if origin.request.sampling.top_logprobs:
        details["top_tokens"] = [_top(token) for token in outcome.tokens]
    return details


def _token(token: Token) -> Json:
    # An end token carries text that was held back before it: clients skip special tokens, and
    # must not skip that.
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special and not token.text,
    }


def _top(token: Token) -> list[Json]:
    return [
        {"id": other, "text": text, "logprob": logprob, "special": False}
        for other, text, logprob in token.top
    ]


def _speculation(origin: Origin, end: Finished) -> Json:
    """What became of the guesses, where there may have been any."""
    if not origin.request.prompt_lookup_num_tokens:
        return {}
    return {"draft_tokens": end.draft_tokens, "accepted_tokens": end.accepted_tokens}


def _timings(end: Finished) -> Json:
    return {
        "queue": round(end.queue_seconds, 6),
        "prefill": round(end.prefill_seconds, 6),
        "decode": round(end.decode_seconds, 6),
    }
