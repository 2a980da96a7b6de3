"""The text-generation skin: `POST /generate`, `/generate_stream` and `/`.

Requests and replies have the shape that text-generation-inference's clients speak, with an adapter
named in `parameters.adapter_id`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator

from adapters.compose import MAX_PARTS, MAX_WEIGHT, Term, parse_terms
from adapters.errors import InvalidAdapter
from service.api.access import Guarded, needs
from service.api.deps import Desk, DeskDep, Serving, ServingDep, TenantDep, unless_gone
from service.api.generation import Collector, Origin, completion, stream_events
from service.api.generation_schema import Completion, StreamEvent
from service.api.intake import DEFAULT_NEW_TOKENS, Chat, Order, Started, client_key, start
from service.api.retrieval import Retrieval, Wanted
from service.api.sse import EventReply, events_of
from service.api.templating import TemplateUse
from service.api.wire import (
    DRAFTS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    MAX_TOP_TOKENS,
    ClientKey,
    Count,
    DraftTokens,
    Fraction,
    Incoming,
    Penalty,
    Reference,
    Seed,
    StopString,
    TokenId,
    refusals,
)
from service.engine.request import Sampling
from service.errors import InvalidRequest
from service.grammars import MAX_SOURCE, Grammar
from service.selection import MAX_REFERENCE

router = APIRouter(tags=["generate"], route_class=Guarded)


class Message(Incoming):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class AdapterPart(Incoming):
    """One adapter of a sum, and its weight."""

    adapter_id: Reference
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


def _form(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "list"
    return "object" if isinstance(value, dict | AdapterPart) else None


AdapterId = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_PARTS * MAX_REFERENCE), Tag("text")]
    | Annotated[
        list[
            Annotated[
                Annotated[Reference, Tag("text")] | Annotated[AdapterPart, Tag("object")],
                Discriminator(
                    _form,
                    custom_error_type="adapter_part",
                    custom_error_message="should be a string or an object with adapter_id",
                ),
            ]
        ],
        Field(min_length=1, max_length=MAX_PARTS),
        Tag("list"),
    ],
    Discriminator(
        _form,
        custom_error_type="adapter_id",
        custom_error_message="should be a string or a list of adapters",
    ),
]


class OutputGrammar(Incoming):
    """What the output must look like, as text-generation-inference has it."""

    type: Literal["json", "json_schema", "regex"]
    value: Annotated[str, Field(max_length=MAX_SOURCE)] | dict[str, Any] = Field(
        description="A JSON schema (an object, or its text), or a regular expression.",
    )

    @property
    def asked(self) -> Grammar:
        if self.type != "regex":
            return Grammar.schema(self.value, "parameters.grammar")
        if not isinstance(self.value, str):
            raise InvalidRequest("a regex is a text", "parameters.grammar")
        return Grammar("regex", self.value, "parameters.grammar")


class ResponseFormat(Incoming):
    """LoRAX's form of a grammar."""

    type: Literal["json_object"]
    spec: dict[str, Any] = Field(alias="schema")


class Parameters(Incoming):
    """How to generate. What is left out has the default of text-generation clients: greedy."""

    adapter_id: AdapterId | None = Field(
        default=None,
        description="`name`, `name@version`, `name@alias` or `sha256:<digest>`; none: the base. "
        'Several, `"a:0.7,b:0.3"` or a list, are added with their weights.',
    )
    client_key: ClientKey | None = Field(
        default=None,
        description="Whoever asks: an alias that shares its traffic keeps a client at one version. "
        "The header `x-client-key` does the same.",
    )
    adapter_source: Literal["local"] = Field(
        default="local", description="Only adapters that were uploaded here; nothing is fetched."
    )
    max_new_tokens: Count | None = Field(
        default=None, description=f"At most; {DEFAULT_NEW_TOKENS}, or what fits, when left out."
    )
    min_new_tokens: int = Field(
        default=0, ge=0, le=MAX_TOKENS, description="No end before so many."
    )
    do_sample: bool | None = Field(
        default=None,
        description="false is greedy, whatever else is set; when left out, a temperature, top_k, "
        "top_p or min_p means sampling.",
    )
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    top_k: int = Field(default=0, ge=0, le=MAX_TOKENS, description="0: all tokens.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: Fraction = 0.0
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Seed | None = Field(
        default=None, description="The same seed gives the same text, whatever else runs."
    )
    stop: list[StopString] = Field(
        default_factory=list, max_length=16, description="Texts that end the output."
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    ignore_eos_token: bool = Field(default=False, description="Another name of ignore_eos.")
    n: int = Field(
        default=1, ge=1, le=MAX_SEQUENCES, description="How many outputs, all of them replied."
    )
    best_of: int = Field(
        default=1,
        ge=1,
        le=MAX_SEQUENCES,
        description="Sample so many and put the most likely one first.",
    )
    return_full_text: bool = Field(default=False, description="Put the prompt before the output.")
    truncate: Count | None = Field(
        default=None, description="Keep only so many last tokens of the prompt."
    )
    details: bool = Field(
        default=False, description="Reply tokens, log-probabilities and the adapter."
    )
    logprobs: bool = Field(default=False, description="Another name of details.")
    decoder_input_details: bool = Field(
        default=False, description="Also the prompt's tokens with their log-probabilities."
    )
    grammar: OutputGrammar | None = Field(
        default=None, description="A JSON schema or a regular expression that the output follows."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="A JSON schema, as LoRAX has it."
    )
    return_k_alternatives: int = Field(
        default=0, ge=0, le=MAX_TOP_TOKENS, description="LoRAX's name of top_n_tokens."
    )
    prompt_lookup_num_tokens: DraftTokens | None = Field(default=None, description=DRAFTS)
    top_n_tokens: int = Field(
        default=0, ge=0, le=MAX_TOP_TOKENS, description="The most likely tokens at each place."
    )
    typical_p: float = Field(
        default=1.0, ge=0, le=1, description="Only 1: typical sampling is not offered."
    )
    watermark: bool = Field(default=False, description="Only false: watermarks are not offered.")

    @field_validator("typical_p")
    @classmethod
    def _no_typical(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError("typical sampling is not offered; leave it out, or use top_p")
        return value

    @field_validator("watermark")
    @classmethod
    def _no_watermark(cls, value: bool) -> bool:
        if value:
            raise ValueError("watermarks are not offered; leave it out")
        return value

    @property
    def terms(self) -> tuple[Term, ...]:
        """The adapters that are named. Raises InvalidRequest."""
        if isinstance(self.adapter_id, str):
            try:
                return parse_terms(self.adapter_id)
            except InvalidAdapter as error:
                raise InvalidRequest(error.reason, error.where) from error
        return tuple(
            Term(part) if isinstance(part, str) else Term(part.adapter_id, part.weight)
            for part in self.adapter_id or ()
        )

    @property
    def sequences(self) -> int:
        return max(self.n, self.best_of)

    @property
    def asked_grammar(self) -> Grammar | None:
        if self.grammar is not None and self.response_format is not None:
            raise InvalidRequest("give grammar or response_format", "parameters.response_format")
        if self.response_format is not None:
            return Grammar.schema(self.response_format.spec, "parameters.response_format")
        return self.grammar.asked if self.grammar else None

    @property
    def samples(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return bool({"temperature", "top_k", "top_p", "min_p"} & self.model_fields_set)

    @property
    def wants_details(self) -> bool:
        return self.details or self.logprobs or self.decoder_input_details


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "chat" if isinstance(value, list) else None


Inputs = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[list[Message], Field(min_length=1, max_length=1024), Tag("chat")],
    Discriminator(_kind),
]


class GenerateBody(Incoming):
    """A prompt as text, or a chat as a list of messages, and how to continue it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": "Once upon a time",
                    "parameters": {"max_new_tokens": 24, "details": True},
                },
                {
                    "inputs": [{"role": "user", "content": "Name the first three letters."}],
                    "parameters": {
                        "max_new_tokens": 24,
                        "do_sample": True,
                        "temperature": 0.7,
                        "top_p": 0.9,
                        "seed": 7,
                        "stop": ["\n\n"],
                    },
                },
            ]
        }
    )

    inputs: Inputs | None = Field(
        default=None, description="Required, but where a template takes no input."
    )
    parameters: Parameters = Field(default_factory=Parameters)
    retrieval: Retrieval | None = Field(
        default=None, description="Passages of a collection before the prompt's question."
    )
    template: TemplateUse | None = Field(
        default=None, description="A prompt template of this server, around the inputs."
    )
    stream: bool = False


_EVENTS = events_of(StreamEvent)  # with `stream`
_ERRORS = refusals(404, 408, 413, 415, 422, 429, 500, 503)


@router.post("/generate", responses={200: {"model": Completion, "content": _EVENTS}, **_ERRORS})
@needs("infer", queues=True)
async def generate(
    body: GenerateBody, request: Request, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> Response:
    """Generate, and reply when it is done. With `"stream": true` like /generate_stream."""
    if body.stream:
        return await generate_stream(body, request, desk, serving, tenant)
    return await unless_gone(request, _complete(body, request, desk, serving, tenant))


@router.post(
    "/generate_stream",
    responses={200: {"content": _EVENTS}, **_ERRORS},
)
@needs("infer", queues=True)
async def generate_stream(
    body: GenerateBody, request: Request, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> Response:
    """Generate, and send each token as a server-sent event the moment it is there."""
    if body.parameters.best_of > 1:
        raise InvalidRequest(
            "a stream cannot take back what it sent: best_of must be 1, or take n",
            "parameters.best_of",
        )
    starting = _start(body, request, desk, serving, tenant, streamed=True)
    started, origin = await unless_gone(request, starting)
    events = stream_events(started.stream, origin, request.scope["request_id"])
    return EventReply(events, started.close, started.headers)


@router.post("/", responses={200: {"model": list[Completion], "content": _EVENTS}, **_ERRORS})
@needs("infer", queues=True)
async def compatible(
    body: GenerateBody, request: Request, desk: DeskDep, serving: ServingDep, tenant: TenantDep
) -> Response:
    """The same as /generate, in a list: clients that are given a plain address post here, and take
    the first of it. A stream is in no list."""
    reply = await generate(body, request, desk, serving, tenant)
    return reply if body.stream else _listed(reply)


def _listed(reply: Response) -> Response:
    """The reply as the only item of a list."""
    headers = {name: reply.headers[name] for name in ("x-adapter-digest",) if name in reply.headers}
    return Response(b"[" + bytes(reply.body) + b"]", headers=headers, media_type="application/json")


async def _complete(
    body: GenerateBody, request: Request, desk: Desk, serving: Serving, tenant: str
) -> Response:
    started, origin = await _start(body, request, desk, serving, tenant, streamed=False)
    try:
        collector = Collector(origin)
        async for event in started.stream:
            collector.add(event)
        # In a thread: a long prompt's tokens are decoded one by one when they are asked for.
        body_of_reply = await asyncio.to_thread(completion, collector)
        return JSONResponse(body_of_reply, headers=dict(started.headers))
    finally:
        started.close()


async def _start(
    body: GenerateBody,
    request: Request,
    desk: Desk,
    serving: Serving,
    tenant: str,
    *,
    streamed: bool,
) -> tuple[Started, Origin]:
    _check_pairs(body)
    order = _order(body, client_key(body.parameters.client_key, request), tenant, streamed)
    started = await start(order, request.scope["request_id"], desk, serving)
    origin = Origin(
        started.request,
        started.selection,
        best_of=body.parameters.best_of > 1,
        details=body.parameters.wants_details,
        prefix=body.inputs if body.parameters.return_full_text else "",  # type: ignore[arg-type]
        decode=started.assembly.decode,
        retrieved=started.retrieved,
        template=started.template,
    )
    return started, origin


def _order(body: GenerateBody, client: str | None, tenant: str, streamed: bool) -> Order:
    """This skin's words for what the engine does."""
    given = body.parameters
    return Order(
        prompt=_prompt(body),
        sampling=Sampling(
            do_sample=given.samples,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=given.seed,
            stop=tuple(given.stop),
            stop_token_ids=tuple(given.stop_token_ids),
            min_new_tokens=given.min_new_tokens,
            ignore_eos=given.ignore_eos or given.ignore_eos_token,
            top_logprobs=max(given.top_n_tokens, given.return_k_alternatives),
        ),
        terms=given.terms,
        client=client,
        max_new_tokens=given.max_new_tokens,
        n=given.sequences,
        truncate=given.truncate,
        prompt_logprobs=given.decoder_input_details,
        prompt_lookup_num_tokens=given.prompt_lookup_num_tokens,
        grammar=given.asked_grammar,
        retrieval=Wanted(body.retrieval, tenant) if body.retrieval else None,
        template=body.template.asked if body.template else None,
        given=frozenset(given.model_fields_set),
        streamed=streamed,
    )


def _prompt(body: GenerateBody) -> str | Chat:
    if isinstance(body.inputs, list):
        return Chat([{"role": m.role, "content": m.content} for m in body.inputs])
    return body.inputs or ""


def _check_pairs(body: GenerateBody) -> None:
    """What one field cannot know of another."""
    given = body.parameters
    if body.inputs is None and body.template is None:
        raise InvalidRequest("inputs: is required", "inputs")
    if body.template is not None and given.return_full_text:
        raise InvalidRequest(
            "return_full_text would show the template; POST /templates/{name}/render does",
            "parameters.return_full_text",
        )
    if given.return_full_text and not isinstance(body.inputs, str):
        raise InvalidRequest(
            "return_full_text needs inputs as one text; a chat has no such prefix",
            "parameters.return_full_text",
        )
    if given.best_of > 1 and given.n > 1:
        raise InvalidRequest(
            f"best_of is {given.best_of} and n is {given.n}: give only one of them",
            "parameters.best_of",
        )
    if given.best_of > 1 and not given.samples:
        raise InvalidRequest(
            f"best_of is {given.best_of}, but greedy outputs are all the same: set do_sample",
            "parameters.best_of",
        )
    if given.max_new_tokens is not None and given.min_new_tokens > given.max_new_tokens:
        raise InvalidRequest(
            f"min_new_tokens is {given.min_new_tokens}, more than max_new_tokens, "
            f"{given.max_new_tokens}",
            "parameters.min_new_tokens",
        )
