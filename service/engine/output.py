"""One sequence's way out: its text, its clock, and the events that its stream gets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from service.engine.detokenizer import Detokenizer
from service.engine.request import Finished, FinishReason, Token
from service.engine.sampler import Sampled, likeliest
from service.engine.sequence import Sequence
from service.engine.stream import Stream
from service.engine.vocabulary import Vocabulary
from service.errors import ServiceError


@dataclass(slots=True, eq=False)
class Output:
    """What a sequence that has not ended owes to whoever waits for it."""

    sequence: Sequence
    stream: Stream
    vocabulary: Vocabulary
    detokenizer: Detokenizer
    submitted: float  # all times by time.perf_counter; 0.0: not yet
    scheduled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    prompt_logprobs: dict[int, float] = field(default_factory=dict)  # by position
    prompt_top: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    hidden: tuple[float, ...] = ()
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def tick(self) -> tuple[bool, float]:
        """A token has come: whether it is the first, and the seconds since the one before, or
        since the request came."""
        now = time.perf_counter()
        first = self.first == 0.0
        seconds = now - (self.submitted if first else self.last)
        self.first = self.first or now
        self.last = now
        return first, seconds

    def send(self, choice: Sampled, text: str, *, special: bool, last: bool) -> None:
        """The next token with its text; the last one takes along what was held back."""
        if last:
            text += self.detokenizer.finish()
        decode = self.vocabulary.tokenizer.decode
        top = tuple((t, str(decode([t])), p) for t, p in choice.top)
        self.stream.push(
            Token(self.sequence.index, choice.token, text, choice.logprob, special, top, last)
        )

    def score(self, position: int, logits: torch.Tensor) -> None:
        """A row [V] of the prompt: what it says of the token at `position`, which comes next."""
        normaliser = logits.logsumexp(-1)
        self.prompt_logprobs[position] = float(logits[self.sequence.tokens[position]] - normaliser)
        if count := self.sequence.request.sampling.top_logprobs:
            self.prompt_top[position] = likeliest(logits, normaliser, count)

    def end(self, reason: FinishReason, error: ServiceError | None) -> Finished:
        """The last event; returns it for the observer."""
        sequence = self.sequence
        tail = self.detokenizer.finish()
        now = time.perf_counter()
        scheduled = self.scheduled or now
        first = self.first or now
        finished = Finished(
            index=sequence.index,
            reason=reason,
            text=self.detokenizer.text,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached,
            generated_tokens=sequence.generated,
            error=error,
            queue_seconds=scheduled - self.submitted,
            prefill_seconds=first - scheduled,
            decode_seconds=now - first,
            tail=tail,
            prompt_logprobs=tuple(p for _, p in sorted(self.prompt_logprobs.items())),
            seed=sequence.seed,
            prompt_top=tuple(top for _, top in sorted(self.prompt_top.items())),
            hidden=self.hidden,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )
        self.stream.push(finished)
        return finished
