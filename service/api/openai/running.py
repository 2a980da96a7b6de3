"""A started generation of the OpenAI skin: its events read to the end, its usage, its reasons."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from service.api.errors import failure
from service.api.generation import Outcome, check_end
from service.api.intake import Started
from service.api.openai_errors import openai_envelope
from service.engine.request import Event, Finished, Token
from service.errors import ServiceError

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"  # after the last event of a stream
_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


def reason_of(end: Finished) -> str:
    """OpenAI's finish_reason."""
    return _REASONS[end.reason]


async def outcomes(started: Started) -> list[Outcome]:
    """All sequences, by index. Raises the ServiceError of one that did not end well."""
    found = [Outcome() for _ in range(started.request.n)]
    async for event in started.stream:
        if isinstance(event, Token):
            found[event.index].tokens.append(event)
        else:
            check_end(event)
            found[event.index].end = event
    return found


class Usage:
    """Tokens of all prompts and outputs of one request."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._output = 0
        self._drafted = self._accepted = 0
        self._seen: set[int] = set()

    def add(self, end: Finished, prompt: int = 0) -> None:
        """One sequence. A prompt counts once, however many sequences share it."""
        self._output += end.generated_tokens
        self._drafted += end.draft_tokens
        self._accepted += end.accepted_tokens
        if prompt not in self._seen:
            self._seen.add(prompt)
            self._prompt += end.prompt_tokens
            self._cached += end.cached_tokens

    def without_output(self, tokens: int) -> None:
        """So many of the output's tokens were never asked for."""
        self._output -= tokens

    def shown(self) -> Json:
        shown: Json = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._output,
            "total_tokens": self._prompt + self._output,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
        if self._drafted:
            shown["completion_tokens_details"] = {
                "accepted_prediction_tokens": self._accepted,
                "rejected_prediction_tokens": self._drafted - self._accepted,
            }
        return shown


async def interleaved(started: Sequence[Started]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several generations, one after the other's end: (which, event)."""
    for place, one in enumerate(started):
        async for event in one.stream:
            yield place, event


def said_as_event(error: ServiceError) -> Json:
    """An error after the first byte."""
    found = failure(error)
    return openai_envelope(found.status, found.error_type, found.message, found.field)
