"""Replies of the text-generation skin, as its clients read them."""

from __future__ import annotations

from pydantic import Field

from service.api.retrieval import RetrievalDetails
from service.api.templating import TemplateDetails
from service.api.wire import AdapterDetails, Outgoing


class TokenDetails(Outgoing):
    """One token of the output."""

    id: int
    text: str
    logprob: float = Field(description="Under the model's own distribution, before sampling.")
    special: bool


class PromptToken(Outgoing):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Timings(Outgoing):
    """Seconds: waiting, prefill, decoding."""

    queue: float
    prefill: float
    decode: float


class SequenceDetails(Outgoing):
    """One of several outputs."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[TokenDetails]
    top_tokens: list[list[TokenDetails]] | None = None


class Details(Outgoing):
    """How the output came about, and which adapter made it."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[TokenDetails]
    top_tokens: list[list[TokenDetails]] | None = None
    best_of_sequences: list[SequenceDetails] | None = None
    adapter: AdapterDetails | None
    prompt_tokens: int
    cached_tokens: int = Field(description="Prompt tokens that came from the prefix cache.")
    timings: Timings
    draft_tokens: int | None = Field(
        default=None, description="Tokens that were guessed, where prompt lookup is on."
    )
    accepted_tokens: int | None = Field(default=None, description="Of these, the right ones.")
    retrieval: RetrievalDetails | None = Field(default=None, description="Where it was asked for.")
    template: TemplateDetails | None = Field(default=None, description="Where one was named.")


class Output(Outgoing):
    """One of n outputs."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None


class Completion(Outgoing):
    """The reply of /generate."""

    generated_text: str
    details: Details | None = None
    generations: list[Output] | None = Field(default=None, description="All outputs, when n > 1.")


class StreamDetails(Outgoing):
    """With the last event of each output."""

    finish_reason: str
    generated_tokens: int
    input_length: int
    seed: int | None
    adapter: AdapterDetails | None
    prompt_tokens: int
    cached_tokens: int
    prefill: list[PromptToken] | None = None
    timings: Timings
    draft_tokens: int | None = Field(
        default=None, description="Tokens that were guessed, where prompt lookup is on."
    )
    accepted_tokens: int | None = Field(default=None, description="Of these, the right ones.")
    retrieval: RetrievalDetails | None = None
    template: TemplateDetails | None = None


class StreamEvent(Outgoing):
    """One event of /generate_stream."""

    index: int = Field(description="Counts the tokens of its output, from 1.")
    sequence: int | None = Field(default=None, description="Which of n outputs, when n > 1.")
    token: TokenDetails
    top_tokens: list[TokenDetails] | None = None
    generated_text: str | None
    details: StreamDetails | None
