"""What the bodies of the OpenAI skin share. Unknown fields are ignored: its clients send many."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from service.api.wire import (
    DRAFTS,
    MAX_SEED,
    MAX_SEQUENCES,
    MAX_TOKENS,
    ClientKey,
    Count,
    DraftTokens,
    Fraction,
    Incoming,
    Penalty,
    StopString,
    TokenId,
)
from service.engine.request import Sampling
from service.errors import InvalidRequest
from service.grammars import MAX_CHOICES, MAX_SOURCE, Grammar

MAX_MODEL = 2048  # characters: a sum names several adapters
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_TOP = 20
MOST = "max_new_tokens"

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL)]
Source = Annotated[str, Field(min_length=1, max_length=MAX_SOURCE)]


class Lenient(Incoming):
    """A body or a part of one, whose unknown fields are ignored; known ones are read strictly."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Lenient):
    include_usage: bool = Field(default=False, description="A last chunk with the usage.")


class SchemaFormat(Lenient):
    """The schema of `response_format`; `strict` makes no difference, it always holds."""

    name: str | None = Field(default=None, max_length=256)
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Lenient):
    """`text`, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(Lenient):
    """vLLM's `structured_outputs`: exactly one of these."""

    regex: Source | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: Source | None = None
    json_value: Source | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None

    @property
    def grammars(self) -> list[Grammar | None]:
        place = "structured_outputs."
        found = _guided(place, self.regex, self.choice, self.grammar, self.json_value)
        return [*found, _any_object(f"{place}json_object") if self.json_object else None]


class Generating(Lenient):
    """What chat completions and completions share. Without a temperature it is 1, as OpenAI's
    clients expect; 0 is greedy. The fields below `seed` are not OpenAI's: they ride in
    `extra_body`."""

    model: ModelName = Field(description="The base's id, or an adapter: name, name@version, …")
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_SEQUENCES)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,8}$")],
        Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
    ] = Field(default_factory=dict, max_length=MAX_BIASES)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(
        default=None,
        max_length=256,
        description="Keeps whoever asks at one version of an alias that shares its traffic.",
    )
    top_k: int = Field(default=0, ge=-1, le=MAX_TOKENS)
    min_p: Fraction = 0.0
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    client_key: ClientKey | None = None
    prompt_lookup_num_tokens: DraftTokens | None = Field(default=None, description=DRAFTS)
    guided_regex: Source | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    guided_json: Source | dict[str, Any] | None = None
    guided_grammar: Source | None = Field(default=None, description="In Lark's form.")
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def samples(self) -> bool:
        return self.temperature > 0 and self.top_p > 0

    @property
    def given(self) -> frozenset[str]:
        """What the request says of sampling, by /generate's names."""
        names = {"max_tokens": MOST, "max_completion_tokens": MOST, "min_tokens": "min_new_tokens"}
        return frozenset(names.get(name, name) for name in self.model_fields_set)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, top_logprobs: int) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            do_sample=self.samples,
            temperature=max(self.temperature, 0.01),
            top_k=max(self.top_k, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else abs(self.seed),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids),
            min_new_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
        )

    @property
    def grammar(self) -> Grammar | None:
        """The one grammar that was asked for. Raises InvalidRequest when there are several."""
        found = [grammar for grammar in self._grammars() if grammar is not None]
        if len(found) > 1:
            names = " and ".join(grammar.field for grammar in found)
            raise InvalidRequest(f"{names} ask for different things; give one", found[1].field)
        return found[0] if found else None

    def _grammars(self) -> list[Grammar | None]:
        other = self.structured_outputs
        return [
            *_guided(
                "guided_",
                self.guided_regex,
                self.guided_choice,
                self.guided_grammar,
                self.guided_json,
            ),
            *(
                _guided(
                    "structured_outputs.",
                    other.regex,
                    other.choice,
                    other.grammar,
                    other.json_value,
                )
                if other
                else ()
            ),
            _any_object("structured_outputs.json_object") if other and other.json_object else None,
            self._formatted(),
        ]

    def _formatted(self) -> Grammar | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return _any_object("response_format")
        given = form.json_schema
        if given is None or given.json_schema is None:
            raise InvalidRequest(
                "response_format json_schema needs json_schema: {name, schema}",
                "response_format.json_schema",
            )
        return Grammar.schema(given.json_schema, "response_format.json_schema")


def _guided(
    prefix: str,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    schema: str | dict[str, Any] | None,
) -> list[Grammar | None]:
    return [
        Grammar("regex", regex, f"{prefix}regex") if regex else None,
        Grammar.choice(choice, f"{prefix}choice") if choice else None,
        Grammar("lark", grammar, f"{prefix}grammar") if grammar else None,
        Grammar.schema(schema, f"{prefix}json") if schema is not None else None,
    ]


def _any_object(field: str) -> Grammar:
    return Grammar.schema({"type": "object"}, field)


__all__ = ["MAX_TOP", "Count", "Generating", "Lenient", "ModelName"]
