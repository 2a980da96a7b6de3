"""From what a skin was asked to a generation that runs: admission, adapter, prompt, engine.

Every skin maps its body to an `Order` and gets a `Started` back. What goes wrong on the way is said
with the names that the skin's clients know: `Names`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from adapters.compose import FIELD, Term
from adapters.errors import InvalidChat
from adapters.outcomes import Ending
from service.admission import Ticket
from service.api.deps import Desk, Serving
from service.api.retrieval import Retrieved, Wanted, found
from service.api.wire import MAX_CLIENT_KEY
from service.engine.request import Finished, Sampling
from service.engine.request import Request as Generation
from service.engine.stream import EventStream
from service.errors import InvalidRequest
from service.experiments import Watched, outcome_of
from service.grammars import Grammar
from service.prompt import passages
from service.prompt.assembly import Assembly
from service.selection import Selection, select

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Names:
    """What a skin's clients call the fields that may be at fault here."""

    prompt: str = "inputs"
    adapter: str = FIELD
    max_new_tokens: str = "parameters.max_new_tokens"
    stop_token_ids: str = "parameters.stop_token_ids"
    logit_bias: str = "logit_bias"
    retrieval: str = "retrieval"
    truncate: str = "parameters.truncate"

    def of(self, field: str | None) -> str | None:
        return {"inputs": self.prompt, FIELD: self.adapter}.get(field or "", field)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the chat template, and functions for a template that shows them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt, and how to continue it. `sampling` has no max_new_tokens, guide and seed yet."""

    prompt: Prompt
    sampling: Sampling
    terms: tuple[Term, ...] = ()  # none: the base
    client: str | None = None  # whoever asks
    selection: Selection | None = None  # what the terms came to, where that is known already
    max_new_tokens: int | None = None  # None: DEFAULT_NEW_TOKENS, or what fits
    fill: bool = False  # None means all that fits
    n: int = 1
    truncate: int | None = None
    prompt_logprobs: bool = False
    pooled: bool = False
    grammar: Grammar | None = None
    retrieval: Wanted | None = None
    names: Names = Names()


@dataclass(frozen=True, slots=True)
class Started:
    """A generation that the engine has taken."""

    stream: EventStream
    request: Generation
    selection: Selection | None
    assembly: Assembly  # of the tokenizer that its tokens are of
    ticket: Ticket
    retrieved: Retrieved | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return {"x-adapter-digest": self.selection.digest} if self.selection else {}

    def close(self) -> None:
        """The reply is over or nobody wants it: let the engine drop what still runs."""
        self.stream.cancel()
        self.ticket.release()


async def start(order: Order, request_id: str, desk: Desk, serving: Serving) -> Started:
    """Admission, adapter, prompt, engine: in the order of their cost.

    Raises what any of them does; nothing of the request remains then.
    """
    with _named(order.names):
        ticket = desk.admission.admit()
        try:
            selection = order.selection or await selected(order.terms, order.client, desk, serving)
            _check_tokens(order, selection, serving)
            # A cold adapter is on its way while the prompt is read.
            ticket.meanwhile(serving.engine.reserved(selection.ref if selection else None))
            serving = replace(serving, assembly=await serving.assembly.of(selection))
            guide = await serving.grammars.guide(order.grammar) if order.grammar else None
            virtual = selection.ref.virtual_tokens if selection else 0
            limit = serving.engine.max_model_len - virtual
            prompt, retrieved = await _prompt(order, selection, serving, limit)
            sampling = replace(
                order.sampling,
                seed=_seed(order.sampling),
                guide=guide,
                max_new_tokens=_room(order, len(prompt), limit),
            )
            generation = Generation(
                id=request_id,
                prompt=prompt,
                sampling=sampling,
                adapter=selection.ref if selection else None,
                n=order.n,
                prompt_logprobs=order.prompt_logprobs,
                pooled=order.pooled,
                vocabulary=serving.assembly.vocabulary,
            )
            stream = _submitted(generation, selection, serving)
            return Started(stream, generation, selection, serving.assembly, ticket, retrieved)
        except BaseException:
            ticket.release()
            raise
        finally:
            ticket.prepared()


def client_key(given: str | None, request: Request) -> str | None:
    """Who asks, by the parameter or else by the header."""
    header = request.headers.get("x-client-key")
    if header and len(header) > MAX_CLIENT_KEY:
        raise InvalidRequest(
            f"{len(header)} characters; should have at most {MAX_CLIENT_KEY}", "x-client-key"
        )
    return given or header or None


async def selected(
    terms: Sequence[Term], client: str | None, desk: Desk, serving: Serving
) -> Selection | None:
    """The versions that the terms name; None for the base."""
    if not terms:
        return None
    found = await asyncio.to_thread(
        select,
        terms,
        serving.store,
        client=client,
        max_rank=serving.limits.max_rank,
        max_bytes=desk.settings.slot_bytes,
    )
    serving.sums.note(found.ref)
    return found


@contextmanager
def _named(names: Names) -> Iterator[None]:
    """Say what is at fault as the skin's clients know it."""
    try:
        yield
    except InvalidChat as error:
        raise InvalidRequest(str(error), names.prompt) from error
    except InvalidRequest as error:
        if names.of(error.field) == error.field:
            raise
        raise InvalidRequest(str(error), names.of(error.field)) from error


def _check_tokens(order: Order, selection: Selection | None, serving: Serving) -> None:
    vocabulary = (selection and selection.ref.vocabulary) or serving.spec.vocab_size
    for what, field, tokens in (
        ("stop token", order.names.stop_token_ids, order.sampling.stop_token_ids),
        ("token", order.names.logit_bias, [token for token, _ in order.sampling.logit_bias]),
    ):
        for token in tokens:
            if token >= vocabulary:
                raise InvalidRequest(
                    f"{what} {token} is outside the vocabulary of {vocabulary}", field
                )


async def _prompt(
    order: Order, selection: Selection | None, serving: Serving, limit: int
) -> tuple[tuple[int, ...], Retrieved | None]:
    if order.retrieval is not None:
        return await _with_passages(order, order.retrieval, selection, serving, limit)
    return await _plain_prompt(order, selection, serving), None


async def _with_passages(
    order: Order, wanted: Wanted, selection: Selection | None, serving: Serving, limit: int
) -> tuple[tuple[int, ...], Retrieved]:
    """The prompt after the passages that were found for it, as many as leave room for both."""
    given, names = order.prompt, order.names
    if isinstance(given, tuple):
        raise InvalidRequest("retrieval needs a text or a chat, not token ids", names.prompt)
    if order.truncate is not None:
        raise InvalidRequest(
            "truncate cuts off the beginning, where the passages stand; leave one of them out",
            names.truncate,
        )
    prompt: str | passages.Chat
    if isinstance(given, str):
        prompt = given
    else:
        template = selection.template if selection else None
        prompt = passages.Chat(given.messages, template, [dict(t) for t in given.tools] or None)
    body = wanted.body
    text = body.query or passages.question_of(prompt)
    where = f"{names.retrieval}."
    answer = await found(body.collection, body, text, wanted.tenant, serving, where)
    started = time.perf_counter()
    new = order.max_new_tokens or max(DEFAULT_NEW_TOKENS, order.sampling.min_new_tokens)
    quoted = await passages.quote(
        prompt, answer.passages, serving.assembly, total=limit - new, most=body.max_tokens
    )
    timings = answer.timings | {"prompt": round(time.perf_counter() - started, 6)}
    told = Retrieved(wanted, quoted.shown, quoted.dropped, quoted.tokens, timings)
    return quoted.prompt, told


async def _plain_prompt(
    order: Order, selection: Selection | None, serving: Serving
) -> tuple[int, ...]:
    given = order.prompt
    if isinstance(given, str):
        return await serving.assembly.text(given, order.truncate)
    if isinstance(given, tuple):
        return given if order.truncate is None else given[-order.truncate :]
    template = selection.template if selection else None
    messages = [dict(message) for message in given.messages]
    tools = [dict(tool) for tool in given.tools] or None
    return await serving.assembly.chat(messages, template, order.truncate, tools)


def _seed(sampling: Sampling) -> int | None:
    """Drawn here, small enough for every JSON reader, so that the reply's seed repeats the text."""
    draws = sampling.do_sample and sampling.seed is None
    return secrets.randbits(32) if draws else sampling.seed


def _room(order: Order, length: int, limit: int) -> int:
    """Output tokens for this prompt. A prompt that is too long by itself is the engine's to say."""
    wanted, least = order.max_new_tokens, order.sampling.min_new_tokens
    if wanted is None:
        most = limit if order.fill else max(DEFAULT_NEW_TOKENS, least)
        return max(min(most, limit - length), 1)
    if length < limit < length + wanted:
        name = order.names.max_new_tokens
        raise InvalidRequest(
            f"the prompt has {length} tokens and {name.rpartition('.')[2]} is {wanted}, together "
            f"{length + wanted}; there is room for {limit}, so for {limit - length} new tokens",
            name,
        )
    return wanted


def _submitted(
    generation: Generation, selection: Selection | None, serving: Serving
) -> EventStream:
    """Hand it to the engine; what comes of a request through an alias is noted."""
    stream = serving.engine.submit(generation)
    via = selection.via if selection else None
    if selection is None or via is None:
        return stream
    version = selection.parts[0].manifest.version

    def note(ending: Ending, ends: tuple[Finished, ...]) -> None:
        serving.experiments.record(outcome_of(generation.id, via, version, ending, ends))

    return Watched(stream, generation.n, note)
