"""From what a skin was asked to a generation that runs: admission, adapter, prompt, engine.

Every skin maps its body to an `Order` and gets a `Started` back. What goes wrong on the way is said
with the names that the skin's clients know: `Names`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from adapters.compose import FIELD, Term, parse_terms
from adapters.errors import InvalidAdapter, InvalidChat
from adapters.outcomes import Ending
from adapters.prompts.shelf import StoredTemplate
from adapters.prompts.template import SAMPLING
from service.access.quotas import Lease
from service.admission import Ticket
from service.api.deps import Desk, Serving
from service.api.retrieval import Retrieved, Wanted, found
from service.api.wire import MAX_CLIENT_KEY
from service.engine.request import Event, Finished, Sampling, Token
from service.engine.request import Request as Generation
from service.engine.stream import EventStream
from service.errors import InvalidRequest
from service.experiments import Watched, outcome_of
from service.grammars import Grammar
from service.prompt import passages
from service.prompt.assembly import Assembly
from service.prompt.templates import FIELD as FIELD_TEMPLATE
from service.prompt.templates import TemplateAsked, TemplateChat
from service.selection import Selection, select
from service.tracing.trace import Generation as Trace
from service.tracing.trace import Operation

DEFAULT_NEW_TOKENS = 128
CHARACTERS_PER_TOKEN = 4
DRAWING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p"})
_SAMPLING = frozenset(SAMPLING) - {"max_new_tokens"}


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
    """Messages for the chat template, and functions for a template that shows them.

    Of a prompt template also: `slotted`, where passages have a place, and how the answer begins.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    slotted: Sequence[Mapping[str, Any]] | None = None
    answer: str = ""


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
    prompt_lookup_num_tokens: int | None = None  # None: as the server's settings say
    grammar: Grammar | None = None
    retrieval: Wanted | None = None
    names: Names = Names()
    template: TemplateAsked | None = None  # the prompt is its input then
    given: frozenset[str] = frozenset()  # sampling that a template's defaults leave alone
    stored: StoredTemplate | None = None  # which template made the prompt
    question: str | None = None  # what was asked before a template's words came around it
    streamed: bool = True  # does the client get tokens as they come?

    @property
    def operation(self) -> Operation:
        if self.pooled:
            return "embeddings"
        return "chat" if isinstance(self.prompt, Chat) else "text_completion"


@dataclass(frozen=True, slots=True)
class Started:
    """A generation that the engine has taken."""

    stream: EventStream
    request: Generation
    selection: Selection | None
    assembly: Assembly  # of the tokenizer that its tokens are of
    ticket: Ticket
    retrieved: Retrieved | None = None
    template: StoredTemplate | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        found = {"x-adapter-digest": self.selection.digest} if self.selection else {}
        return found | ({"x-template-digest": self.template.digest} if self.template else {})

    def close(self) -> None:
        """The reply is over or nobody wants it: let the engine drop what still runs."""
        self.stream.cancel()
        self.ticket.release()


async def start(order: Order, request_id: str, desk: Desk, serving: Serving) -> Started:
    """Admission, adapter, prompt, engine: in the order of their cost.

    Raises what any of them does; nothing of the request remains then.
    """
    if order.retrieval is not None:
        serving.caller.check("rag")
    reserved = _most_tokens(order, _length(order.prompt))
    if serving.lease is not None:  # before anything is read or tokenized
        await serving.lease.reserve(reserved)
    ticket = desk.admission.admit(serving.caller.tenant)
    trace = desk.tracing.generation(request_id)
    try:
        order = await templated(order, serving)
        with _named(order.names):
            return await _started(order, request_id, ticket, trace, desk, serving, reserved)
    except BaseException as error:
        trace.failed(error)
        ticket.release()
        raise
    finally:
        ticket.prepared()


async def _started(
    order: Order,
    request_id: str,
    ticket: Ticket,
    trace: Trace,
    desk: Desk,
    serving: Serving,
    reserved: int,
) -> Started:
    selection = order.selection or await selected(order.terms, order.client, desk, serving)
    trace.chosen(order.operation, selection)
    _check_tokens(order, selection, serving)
    # A cold adapter is on its way while the prompt is read.
    ticket.meanwhile(serving.engine.reserved(selection.ref if selection else None))
    serving = replace(serving, assembly=await serving.assembly.of(selection))
    own = serving.assembly.vocabulary
    guide = await serving.grammars.guide(order.grammar, own) if order.grammar else None
    virtual = selection.ref.virtual_tokens if selection else 0
    limit = serving.engine.max_model_len - virtual
    prompt, retrieved = await _prompt(order, selection, serving, limit)
    sampling = replace(
        order.sampling,
        seed=_seed(order.sampling),
        guide=guide,
        max_new_tokens=_room(order, len(prompt), limit),
    )
    if serving.lease is not None:
        wanted = _most_tokens(order, len(prompt), sampling.max_new_tokens)
        await serving.lease.reserve(wanted - reserved)
    generation = Generation(
        id=request_id,
        prompt=prompt,
        sampling=sampling,
        adapter=selection.ref if selection else None,
        n=order.n,
        prompt_logprobs=order.prompt_logprobs,
        pooled=order.pooled,
        prompt_lookup_num_tokens=_lookup(order, desk),
        tenant=serving.caller.tenant,
        vocabulary=own,
        streamed=order.streamed,
    )
    _note(order, selection, serving)
    stream = trace.followed(_submitted(generation, selection, serving), generation)
    return Started(stream, generation, selection, serving.assembly, ticket, retrieved, order.stored)


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


async def reader(
    reference: str | None, client: str | None, desk: Desk, serving: Serving
) -> tuple[Selection | None, Assembly]:
    """What `adapter_id` names where nothing is generated, and the tokenizer that it reads with.

    Raises InvalidRequest, AdapterNotFound, StoreUnavailable.
    """
    with _named(Names(adapter="adapter_id")):
        try:
            terms = parse_terms(reference) if reference else ()
        except InvalidAdapter as error:
            raise InvalidRequest(error.reason, error.where) from error
        selection = await selected(terms, client, desk, serving)
        return selection, await serving.assembly.of(selection)


async def preview(
    made: TemplateChat,
    asked: Sequence[Mapping[str, Any]],
    wanted: Wanted,
    selection: Selection | None,
    serving: Serving,
) -> tuple[Sequence[Mapping[str, Any]], Retrieved]:
    """The messages of a template's chat with the passages that a request would get.

    `serving` has the tokenizer that reads them. Raises InvalidRequest, and what a search does.
    """
    order = Order(
        Chat(made.messages, (), made.slotted, made.answer),
        Sampling(),
        question=str(asked[-1]["content"]) if asked else None,
        names=Names(prompt="inputs"),
    )
    order = with_defaults(order, made.stored.template.sampling or {})
    virtual = selection.ref.virtual_tokens if selection else 0
    limit = serving.engine.max_model_len - virtual
    quoted, told = await with_passages(order, wanted, selection, serving, limit)
    return quoted.messages, told


async def templated(order: Order, serving: Serving) -> Order:
    """The order with its prompt template filled in, and with the template's defaults.

    Raises TemplateNotFound, InvalidRequest, StoreUnavailable.
    """
    asked = order.template
    if asked is None:
        return order
    if isinstance(order.prompt, tuple):
        raise InvalidRequest("a template takes a text or a chat, not token ids", order.names.prompt)
    tools: Sequence[Mapping[str, Any]] = ()
    if isinstance(order.prompt, Chat):
        messages, tools = order.prompt.messages, order.prompt.tools
    else:
        messages = [{"role": "user", "content": order.prompt}] if order.prompt else []
    passages = order.retrieval is not None
    made = await serving.templates.chat(
        asked, messages, passages=passages, input_field=order.names.prompt
    )
    template = made.stored.template
    defaults = {k: v for k, v in (template.sampling or {}).items() if k not in order.given}
    return replace(
        with_defaults(order, defaults),
        prompt=Chat(made.messages, tools, made.slotted, made.answer),
        terms=order.terms or (parse_terms(template.adapter) if template.adapter else ()),
        template=None,
        stored=made.stored,
        question=str(messages[-1]["content"]) if messages else None,
        names=replace(order.names, prompt=FIELD_TEMPLATE),
    )


def with_defaults(order: Order, defaults: Mapping[str, Any]) -> Order:
    """The order with a template's sampling, where the request says nothing of it."""
    fields = {name: value for name, value in defaults.items() if name in _SAMPLING}
    if "stop" in fields:
        fields["stop"] = tuple(fields["stop"])
    if "do_sample" not in fields and not order.given & DRAWING and defaults.keys() & DRAWING:
        fields["do_sample"] = True
    elif order.given & DRAWING:  # the request says by itself whether to sample
        fields.pop("do_sample", None)
    most = order.max_new_tokens or defaults.get("max_new_tokens")
    least = fields.get("min_new_tokens", 0)
    if most is not None and least > most:
        fields["min_new_tokens"] = most
    return replace(order, sampling=replace(order.sampling, **fields), max_new_tokens=most)


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
        quoted, told = await with_passages(order, order.retrieval, selection, serving, limit)
        return quoted.prompt, told
    return await _plain_prompt(order, selection, serving), None


async def with_passages(
    order: Order, wanted: Wanted, selection: Selection | None, serving: Serving, limit: int
) -> tuple[passages.Quoted, Retrieved]:
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
        tools = [dict(tool) for tool in given.tools] or None
        prompt = passages.Chat(given.messages, template, tools, given.slotted, given.answer)
    body = wanted.body
    text = body.query or order.question or passages.question_of(prompt)
    where = f"{names.retrieval}."
    answer = await found(body.collection, body, text, wanted.tenant, serving, where)
    started = time.perf_counter()
    new = order.max_new_tokens or max(DEFAULT_NEW_TOKENS, order.sampling.min_new_tokens)
    quoted = await passages.quote(
        prompt, answer.passages, serving.assembly, total=limit - new, most=body.max_tokens
    )
    timings = answer.timings | {"prompt": round(time.perf_counter() - started, 6)}
    told = Retrieved(wanted, quoted.shown, quoted.dropped, quoted.tokens, timings)
    return quoted, told


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
    return await serving.assembly.chat(messages, template, order.truncate, tools, given.answer)


def _lookup(order: Order, desk: Desk) -> int:
    """Most tokens of a draft."""
    if order.prompt_lookup_num_tokens is None:
        return desk.settings.prompt_lookup_num_tokens
    return order.prompt_lookup_num_tokens


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


def _note(order: Order, selection: Selection | None, serving: Serving) -> None:
    """What serves the request, for its line of the audit log."""
    if selection is not None:
        serving.said["digest"] = selection.digest
        serving.said["adapter"] = [
            f"{part.manifest.name}@{part.manifest.version}:{part.manifest.digest}"
            for part in selection.parts
        ]
    if order.stored is not None:
        serving.said["template"] = f"{order.stored}:{order.stored.digest}"


def _length(prompt: Prompt) -> int:
    """About how many tokens; how many it has is known once it is read."""
    if isinstance(prompt, tuple):
        return len(prompt)
    texts = [prompt] if isinstance(prompt, str) else (one.get("content") for one in prompt.messages)
    return sum(len(text) for text in texts if isinstance(text, str)) // CHARACTERS_PER_TOKEN


def _most_tokens(order: Order, prompt: int, new: int | None = None) -> int:
    wanted = order.max_new_tokens if new is None else new
    return prompt + order.n * (DEFAULT_NEW_TOKENS if wanted is None else wanted)


class Metered:
    """An EventStream that counts what it brings on the tenant's account."""

    def __init__(self, stream: EventStream, prompt_tokens: int, lease: Lease) -> None:
        self._stream = stream
        self._lease = lease
        lease.use(prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in self._stream:
            if isinstance(event, Token):
                self._lease.use(1)
            yield event

    def cancel(self) -> None:
        self._stream.cancel()


def _submitted(
    generation: Generation, selection: Selection | None, serving: Serving
) -> EventStream:
    """Hand it to the engine; what comes of a request through an alias is noted."""
    stream = serving.engine.submit(generation)
    if serving.lease is not None:
        stream = Metered(stream, len(generation.prompt), serving.lease)
    via = selection.via if selection else None
    if selection is None or via is None:
        return stream
    version = selection.parts[0].manifest.version

    def note(ending: Ending, ends: tuple[Finished, ...]) -> None:
        tenant = serving.caller.tenant
        serving.experiments.record(outcome_of(generation.id, via, version, ending, ends, tenant))

    return Watched(stream, generation.n, note)
