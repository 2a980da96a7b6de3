"""Replies of the OpenAI skin, as its clients read them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.retrieval import RetrievalDetails
from service.api.templating import TemplateDetails
from service.api.wire import Outgoing


class PromptTokensDetails(Outgoing):
    cached_tokens: int = Field(description="Prompt tokens that came from the prefix cache.")


class CompletionTokensDetails(Outgoing):
    """What became of speculative tokens."""

    accepted_prediction_tokens: int = Field(description="Guessed by prompt lookup, and right.")
    rejected_prediction_tokens: int = Field(
        description="Guessed and dropped; they are in no other count."
    )


class UsageView(Outgoing):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class Entry(Outgoing):
    token: str
    logprob: float
    bytes: list[int]


class TopEntry(Entry):
    top_logprobs: list[Entry]


class ChatLogprobs(Outgoing):
    content: list[TopEntry]
    refusal: None


class CallView(Outgoing):
    id: str
    type: Literal["function"]
    function: dict[str, str] = Field(description="Its name, and its arguments as JSON.")
    index: int | None = None


class MessageView(Outgoing):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallView] | None = None


class ChatChoice(Outgoing):
    index: int
    message: MessageView
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Outgoing):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageView
    retrieval: RetrievalDetails | None = None
    template: TemplateDetails | None = None


class DeltaView(Outgoing):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallView] | None = None


class ChunkChoice(Outgoing):
    index: int
    delta: DeltaView
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Outgoing):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageView | None = None
    retrieval: RetrievalDetails | None = Field(default=None, description="With the first chunk.")
    template: TemplateDetails | None = Field(default=None, description="With the first chunk.")


class TextLogprobsView(Outgoing):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Outgoing):
    index: int
    text: str
    logprobs: TextLogprobsView | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Outgoing):
    """The reply of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageView | None = None


class EmbeddingView(Outgoing):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str = Field(description="Numbers, or float32 in base64.")


class EmbeddingUsage(Outgoing):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Outgoing):
    """The reply of /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingView]
    usage: EmbeddingUsage
