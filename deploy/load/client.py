"""One request over OpenAI's API, streamed and clocked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import httpx


@dataclass(slots=True)
class Reply:
    """What a client saw of one request. Times are seconds from when it should have been sent."""

    adapter: str | None
    first: float = 0.0  # to the first text, or to the end where no token had any
    last: float = 0.0  # to the last one
    gaps: list[float] = field(default_factory=list)  # between two chunks of text
    tokens: int = 0
    fault: str = ""  # why it failed; empty: it did not

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first: TPOT."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def good(self, first: float, per_token: float) -> bool:
        """Whether it kept to these bounds."""
        return not self.fault and self.first <= first and self.per_token <= per_token


async def ask(
    http: httpx.AsyncClient,
    model: str,
    adapter: str | None,
    text: str | list[int],
    tokens: int,
    due: float,
) -> Reply:
    """Ask for exactly `tokens` tokens. `due` is when, by time.perf_counter."""
    reply = Reply(adapter)
    body = {
        "model": adapter or model,
        "prompt": text,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                await response.aread()
                reply.fault = f"HTTP {response.status_code}"
                return reply
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(reply, json.loads(line[6:]), time.perf_counter() - due)
    except httpx.HTTPError as error:
        reply.fault = type(error).__name__
    if not reply.fault and reply.tokens != tokens:
        reply.fault = f"{reply.tokens} tokens of {tokens}"
    return reply


def _take(reply: Reply, chunk: dict[str, object], now: float) -> None:
    if "error" in chunk:
        reply.fault = "error in the stream"
    if usage := chunk.get("usage"):
        assert isinstance(usage, dict)
        reply.tokens = usage["completion_tokens"]
    choices = chunk.get("choices")
    assert choices is None or isinstance(choices, list)
    if choices and choices[0].get("text"):
        if reply.first:
            reply.gaps.append(now - reply.last)
        reply.first = reply.first or now
        reply.last = now
    elif choices and choices[0].get("finish_reason") and not reply.first:
        reply.first = reply.last = now  # tokens without a letter: an end of text, gone on after
