"""`POST /v1/completions`: texts or token ids, several at once, echoed and scored if asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Discriminator, Field, Tag

from service.api.access import Guarded, needs
from service.api.deps import Desk, DeskDep, Serving, ServingDep, unless_gone
from service.api.generation import Outcome, check_end
from service.api.intake import Order, Started, client_key, start
from service.api.openai.logprobs import TextLogprobs, joined
from service.api.openai.replies import TextCompletion
from service.api.openai.running import DONE, Usage, interleaved, outcomes, reason_of, said_as_event
from service.api.openai.schema import MAX_TOP, Generating
from service.api.openai.served import TEXT, model_errors, terms_of
from service.api.openai_errors import openai_refusals
from service.api.sse import EventReply, events_of
from service.api.templating import TemplateUse
from service.api.wire import MAX_SEQUENCES, MAX_TOKENS, TokenId
from service.engine.request import Finished, Token
from service.errors import InvalidRequest, ServiceError

router = APIRouter(prefix="/v1", tags=["openai"], route_class=Guarded)

Json = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]

MAX_PROMPTS = 256
DEFAULT_TOKENS = 16  # OpenAI's


def prompt_form(value: Any) -> str | None:
    """What a prompt is: one text, several, one list of ids, or several."""
    if isinstance(value, str):
        return "one text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "texts"
    return "several ids" if isinstance(first, list) else "ids"


Prompts = Annotated[
    Annotated[Text, Tag("one text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("several ids")],
    Discriminator(
        prompt_form,
        custom_error_type="prompt",
        custom_error_message="should be a text, a list of texts, token ids, or a list of those",
    ),
]


def split(prompts: Any) -> list[str | tuple[int, ...]]:
    """Each prompt by itself."""
    form = prompt_form(prompts)
    if form == "one text":
        return [prompts]
    if form == "ids":
        return [tuple(prompts)]
    return [one if isinstance(one, str) else tuple(one) for one in prompts]


class CompletionBody(Generating):
    """Prompts, and how to continue them. Unknown fields are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "mini", "prompt": "Once there was ", "max_tokens": 24, "temperature": 0},
                {
                    "model": "mini",
                    "prompt": [[5, 6, 7]],
                    "max_tokens": 1,
                    "echo": True,
                    "logprobs": 1,
                },
            ]
        }
    )

    prompt: Prompts
    max_tokens: int = Field(
        default=DEFAULT_TOKENS, ge=0, le=MAX_TOKENS, description="0 only scores the prompt (echo)."
    )
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_SEQUENCES, description="Sample so many; the likeliest n stay."
    )
    template: TemplateUse | None = Field(
        default=None,
        description="A prompt template of this server, around each prompt (extra_body).",
    )
    suffix: str | None = Field(default=None, max_length=0, description="Not offered.")

    @property
    def sequences(self) -> int:
        return max(self.n, self.best_of or 1)


@router.post(
    "/completions",
    responses={
        200: {
            "model": TextCompletion,
            "content": events_of(TextCompletion, "[DONE]"),
        },
        **openai_refusals(404, 408, 413, 415, 422, 429, 500, 503),
    },
)
@needs("infer", queues=True)
async def text_completion(
    body: CompletionBody, request: Request, desk: DeskDep, serving: ServingDep
) -> Response:
    """Continue each prompt; with `"stream": true` in chunks as server-sent events."""
    _check_pairs(body)
    if not body.stream:
        return await unless_gone(request, _complete(body, request, desk, serving))
    reply = await unless_gone(request, _start(body, request, desk, serving))
    return EventReply(reply.chunks(), reply.close, reply.headers, ending=DONE)


async def _complete(
    body: CompletionBody, request: Request, desk: Desk, serving: Serving
) -> Response:
    return await (await _start(body, request, desk, serving)).whole()


def _check_pairs(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of < body.n:
        raise InvalidRequest(f"best_of is {body.best_of}, less than n, {body.n}", "best_of")
    if body.sequences > body.n and body.stream:
        raise InvalidRequest("a stream cannot take back what it sent: best_of must be n", "best_of")
    if body.sequences > body.n and not body.samples:
        raise InvalidRequest(
            f"best_of is {body.best_of}, but greedy outputs are all the same: raise temperature",
            "best_of",
        )
    if body.template is not None and body.echo:
        raise InvalidRequest(
            "echo would show the template; POST /templates/{name}/render does", "echo"
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest(
            "max_tokens is 0, so there is nothing to reply without echo", "max_tokens"
        )
    count = len(split(body.prompt)) * body.sequences
    if count > MAX_PROMPTS:
        raise InvalidRequest(
            f"{count} outputs, the prompts times n or best_of; at most {MAX_PROMPTS}", "prompt"
        )


async def _start(body: CompletionBody, request: Request, desk: Desk, serving: Serving) -> _Reply:
    """One generation for each prompt; when one is refused, so are all."""
    order = Order(
        prompt="",
        sampling=body.sampling(body.logprobs or 0),
        terms=terms_of(body.model, desk, serving),
        client=client_key(body.client_key or body.user, request),
        max_new_tokens=max(body.max_tokens, 1),
        prompt_lookup_num_tokens=body.prompt_lookup_num_tokens,
        n=body.sequences,
        prompt_logprobs=body.echo and body.logprobs is not None,
        grammar=body.grammar,
        names=TEXT,
        template=body.template.asked if body.template else None,
        given=body.given | {"max_new_tokens"},  # OpenAI's default of it is a number
        streamed=body.stream,
    )
    request_id: str = request.scope["request_id"]
    with ExitStack() as undo, model_errors(body.model):
        started = []
        for place, prompt in enumerate(split(body.prompt)):
            own_id = f"{request_id}-{place}" if place else request_id
            one = await start(replace(order, prompt=prompt), own_id, desk, serving)
            undo.callback(one.close)
            started.append(one)
        undo.pop_all()
    return _Reply(body, started, serving)


class _Reply:
    """The reply to all prompts, whole or in chunks."""

    def __init__(self, body: CompletionBody, started: Sequence[Started], serving: Serving) -> None:
        self._body = body
        self._started = started
        self._assembly = started[0].assembly if started else serving.assembly
        self._usage = Usage()
        self._head: Json = {
            "id": f"cmpl-{started[0].request.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": serving.spec.fingerprint[:16],
        }

    @property
    def headers(self) -> Mapping[str, str]:
        return self._started[0].headers

    def close(self) -> None:
        for one in self._started:
            one.close()

    async def whole(self) -> Response:
        try:
            choices: list[Json] = []
            for place, one in enumerate(self._started):
                found = await outcomes(one)
                for outcome in found:
                    self._count(outcome.closed, place)
                if self._body.sequences > self._body.n:
                    found = sorted(found, key=lambda o: -o.likelihood)[: self._body.n]
                choices += await asyncio.to_thread(self._choices, place, found)
            body = self._head | {"choices": choices, "usage": self._usage.shown()}
            return JSONResponse(body, headers=dict(self.headers))
        finally:
            self.close()

    def _count(self, end: Finished, place: int) -> None:
        self._usage.add(end, place)
        if self._body.max_tokens == 0:
            self._usage.without_output(end.generated_tokens)

    def _choices(self, place: int, found: Sequence[Outcome]) -> list[Json]:
        return [self._choice(place, number, outcome) for number, outcome in enumerate(found)]

    def _choice(self, place: int, number: int, outcome: Outcome) -> Json:
        scored_only = self._body.max_tokens == 0
        tokens = [] if scored_only else outcome.tokens
        text = "" if scored_only else outcome.closed.text
        if self._body.echo:
            text = self._echo(place) + text
        return {
            "index": place * self._body.n + number,
            "text": text,
            "logprobs": self._logprobs(place, outcome.closed, tokens),
            "finish_reason": "length" if scored_only else reason_of(outcome.closed),
        }

    def _logprobs(self, place: int, end: Finished, tokens: Sequence[Token]) -> Json | None:
        if self._body.logprobs is None:
            return None
        lists = TextLogprobs(self._body.logprobs, self._assembly.decode)
        if not self._body.echo:
            return lists.of(tokens)
        ids = self._started[place].request.prompt
        prompt = lists.of_prompt(ids, end.prompt_logprobs, end.prompt_top)
        return joined(prompt, lists.of(tokens))

    def _echo(self, place: int) -> str:
        """The prompt as it was given; of ids, their text."""
        given = split(self._body.prompt)[place]
        return given if isinstance(given, str) else self._assembly.text_of(given)

    async def chunks(self) -> AsyncIterator[Json]:
        told: dict[int, TextLogprobs] = {}
        echoed: set[int] = set()
        try:
            async for place, event in interleaved(self._started):
                index = place * self._body.n + event.index
                if index not in echoed and self._body.echo:
                    echoed.add(index)
                    yield self._chunk(index, self._echo(place))
                if isinstance(event, Token):
                    lists = told.setdefault(
                        index, TextLogprobs(self._body.logprobs or 0, self._assembly.decode)
                    )
                    if self._body.max_tokens:
                        shown = lists.of([event]) if self._body.logprobs is not None else None
                        yield self._chunk(index, event.text, shown)
                    continue
                check_end(event)
                self._count(event, place)
                yield self._chunk(index, event.tail, reason=reason_of(event))
        except ServiceError as error:
            yield said_as_event(error)
            return
        if self._body.wants_usage:
            yield self._head | {"choices": [], "usage": self._usage.shown()}

    def _chunk(
        self, index: int, text: str, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        usage: Json = {"usage": None} if self._body.wants_usage else {}
        return self._head | {"choices": [choice]} | usage
