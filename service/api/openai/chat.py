"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from adapters.errors import InvalidChat
from adapters.template import own_template
from service.api.access import Guarded, needs
from service.api.deps import Desk, DeskDep, Serving, ServingDep, TenantDep, unless_gone
from service.api.generation import Outcome, check_end, paired
from service.api.intake import Chat, Order, Started, client_key, selected, start, templated
from service.api.openai.chat_schema import ChatBody
from service.api.openai.logprobs import chat_logprobs
from service.api.openai.replies import ChatChunk, ChatCompletion
from service.api.openai.running import DONE, Usage, outcomes, reason_of, said_as_event
from service.api.openai.served import CHAT, model_errors, terms_of
from service.api.openai.tools import CallReader, Form, described, form_of, required
from service.api.openai_errors import openai_refusals
from service.api.retrieval import Wanted
from service.api.sse import EventReply, events_of
from service.api.templating import served_by
from service.engine.request import Finished, Token
from service.errors import InvalidRequest, ServiceError
from service.grammars import Grammar

router = APIRouter(prefix="/v1/chat", tags=["openai"], route_class=Guarded)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """How an output is to be read: whether calls are looked for, and with or without marks."""

    calls: bool = False
    bare: bool = False

    def reader(self) -> CallReader | None:
        return CallReader(self.bare) if self.calls else None


@router.post(
    "/completions",
    responses={
        200: {
            "model": ChatCompletion,
            "content": events_of(ChatChunk, "[DONE]"),
        },
        **openai_refusals(404, 408, 413, 415, 422, 429, 500, 503),
    },
)
@needs("infer", queues=True)
async def chat_completion(
    body: ChatBody, request: Request, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> Response:
    """Continue a chat; with `"stream": true` in chunks as server-sent events."""
    if not body.stream:
        return await unless_gone(request, _complete(body, request, desk, serving, tenant))
    reply = await unless_gone(request, _start(body, request, desk, serving, tenant))
    return EventReply(reply.chunks(), reply.started.close, reply.started.headers, ending=DONE)


async def _complete(
    body: ChatBody, request: Request, desk: Desk, serving: Serving, tenant: str
) -> Response:
    return await (await _start(body, request, desk, serving, tenant)).whole()


async def _start(
    body: ChatBody, request: Request, desk: Desk, serving: Serving, tenant: str
) -> _Reply:
    if not body.messages and body.template is None:
        raise InvalidRequest("messages: at least one is needed", "messages")
    terms = terms_of(body.model, desk, serving)
    client = client_key(body.client_key or body.user, request)
    with model_errors(body.model):
        order = Order(
            prompt=Chat([message.plain for message in body.messages]),
            sampling=body.sampling(body.top_logprobs if body.logprobs else 0),
            terms=terms,
            client=client,
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            fill=True,
            n=body.n,
            prompt_lookup_num_tokens=body.prompt_lookup_num_tokens,
            grammar=body.grammar,
            retrieval=Wanted(body.retrieval, tenant) if body.retrieval else None,
            names=replace(CHAT, max_new_tokens="max_tokens") if body.max_tokens else CHAT,
            template=body.template.asked if body.template else None,
            given=body.given,
            streamed=body.stream,
        )
        reading = Reading()
        if body.speaks_of_tools:
            # The template says how tools are shown, and the adapter may bring one of its own.
            order = await templated(order, serving)
            selection = await selected(order.terms, client, desk, serving)
            order, reading = _with_tools(body, replace(order, selection=selection), serving)
        started = await start(order, request.scope["request_id"], desk, serving)
    return _Reply(body, started, reading, serving)


def _with_tools(body: ChatBody, order: Order, serving: Serving) -> tuple[Order, Reading]:
    """The order with its tools shown, and how to read what comes of them."""
    assert isinstance(order.prompt, Chat)
    own = order.selection.template if order.selection else None
    form = form_of(own if own is not None else _template(serving))
    tools, messages = body.offered, [dict(message) for message in order.prompt.messages]
    prompt = (
        _described(tools, order.prompt)
        if form == "described"
        else replace(order.prompt, messages=messages, tools=tools)
    )
    bare = form == "template"
    reading = Reading(bool(tools) and (body.must_call or not bare), bare)
    grammar = _forced(body, tools, form, order.grammar)
    return replace(order, prompt=prompt, grammar=grammar), reading


def _described(tools: list[Json], chat: Chat) -> Chat:
    """Told in words, in both forms of a prompt template's chat."""

    def told(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
        return described(tools, [dict(message) for message in messages])

    slotted = None if chat.slotted is None else told(chat.slotted)
    return replace(chat, messages=told(chat.messages), tools=(), slotted=slotted)


def _template(serving: Serving) -> str:
    try:
        return own_template(serving.assembly.tokenizer)
    except InvalidChat as error:
        raise InvalidRequest(str(error), "messages") from error


def _forced(
    body: ChatBody, tools: list[Json], form: Form, grammar: Grammar | None
) -> Grammar | None:
    if not body.must_call:
        return grammar
    if grammar is not None:
        raise InvalidRequest(
            f"{grammar.field} and a required tool call ask for different outputs", "tool_choice"
        )
    return required(tools, form)


class _Reply:
    """One chat completion, whole or in chunks."""

    def __init__(
        self, body: ChatBody, started: Started, reading: Reading, serving: Serving
    ) -> None:
        self._body = body
        self.started = started
        self._reading = reading
        self._decode = started.assembly.decode
        self._head: Json = {
            "id": f"chatcmpl-{started.request.id}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": serving.spec.fingerprint[:16],
        }

    async def whole(self) -> Response:
        try:
            found = await outcomes(self.started)
            usage = Usage()
            for outcome in found:
                usage.add(outcome.closed)
            choices = await asyncio.to_thread(lambda: [self._choice(o) for o in found])
            reply = {"object": "chat.completion", "choices": choices, "usage": usage.shown()}
            reply |= self._retrieved()
            return JSONResponse(self._head | reply, headers=dict(self.started.headers))
        finally:
            self.started.close()

    def _retrieved(self) -> Json:
        """What stands in the prompt beside the chat: passages, and a template's words."""
        found, template = self.started.retrieved, self.started.template
        told: Json = {"retrieval": found.told()} if found else {}
        return told | ({"template": served_by(template)} if template else {})

    def _choice(self, outcome: Outcome) -> Json:
        end = outcome.closed
        text, calls = end.text, []
        if reader := self._reading.reader():
            said, _ = reader.push(end.text)
            rest, _ = reader.finish()
            text, calls = said + rest, [call.shown() for call in reader.calls]
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text.strip() or None, "tool_calls": calls}
        told = self._body.logprobs
        return {
            "index": end.index,
            "message": message,
            "logprobs": chat_logprobs(outcome.tokens, self._decode) if told else None,
            "finish_reason": "tool_calls" if calls else reason_of(end),
        }

    async def chunks(self) -> AsyncIterator[Json]:
        """The first chunk of each choice has the role, the last one the reason."""
        usage = Usage()
        readers = [self._reading.reader() for _ in range(self._body.n)]
        for index in range(self._body.n):
            told = {} if index else self._retrieved()
            yield self._chunk(index, {"role": "assistant", "content": ""}) | told
        try:
            async for token, end in paired(self.started.stream):
                if end is not None:
                    check_end(end)
                    usage.add(end)
                index = token.index if token is not None else end.index  # type: ignore[union-attr]
                for delta in _deltas(token, end, readers[index]):
                    yield self._chunk(index, delta, token=token)
                    token = None  # its log-probability is told once
                if token is not None and self._body.logprobs:
                    yield self._chunk(index, {"content": ""}, token=token)
                if end is not None:
                    reader = readers[index]
                    called = reader is not None and bool(reader.calls)
                    yield self._chunk(index, {}, "tool_calls" if called else reason_of(end))
        except ServiceError as error:
            yield said_as_event(error)
            return
        if self._body.wants_usage:
            yield self._head | {
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage.shown(),
            }

    def _chunk(
        self, index: int, delta: Json, reason: str | None = None, token: Token | None = None
    ) -> Json:
        told = token is not None and self._body.logprobs
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs([token], self._decode) if told and token else None,
            "finish_reason": reason,
        }
        usage: Json = {"usage": None} if self._body.wants_usage else {}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | usage


def _deltas(token: Token | None, end: Finished | None, reader: CallReader | None) -> list[Json]:
    """What a token adds to its choice: text, and calls that it completes."""
    piece = token.text if token is not None else ""
    if token is None and end is not None:
        piece = end.tail
    if reader is None:
        return [{"content": piece}] if piece else []
    before = len(reader.calls)
    text, calls = reader.push(piece)
    if end is not None:
        rest, more = reader.finish()
        text, calls = text + rest, calls + more
    if reader.calls and not text.strip():
        text = ""
    said: list[Json] = [{"content": text}] if text else []
    return said + [
        {"tool_calls": [call.shown(place)]} for place, call in enumerate(calls, start=before)
    ]
