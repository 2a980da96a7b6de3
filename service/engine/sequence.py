"""A request's token state in the engine. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from service.engine.request import AdapterRef, Request

if TYPE_CHECKING:
    from service.engine.guide import Walk
    from service.engine.speculation import Drafter


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks and, if it names an adapter, a reference to its slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of the `n` generations of a request: prompt and output tokens, and how far the cache is.

    Token i stands at position `virtual_tokens` + i; `blocks` begin with the virtual tokens.

    `computed` counts the leading tokens whose keys and values are in the cache; a step computes
    tokens[computed : computed + count] and, when that reaches the end, samples the next token.
    """

    id: int
    request: Request
    index: int  # which of the request's n generations
    seed: int
    tokens: list[int]
    prompt_length: int
    namespace: bytes  # salt of the prefix cache: tenant, base, adapter, placement
    leader: Sequence | None = None  # the sibling that computes the shared prompt first
    status: Status = Status.WAITING
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks
    computed: int = 0
    remembered: int = 0  # leading blocks that the pool knows by their hash
    cached: int = 0  # prompt tokens that came from the prefix cache at the first admission
    admitted: bool = False  # was scheduled at least once
    holds_adapter: bool = False
    walk: Walk | None = None  # through the grammar that its output must follow
    drafter: Drafter | None = None  # where it may speculate
    skipped: int = 0  # schedules that asked for its adapter in vain
    active_from: int = field(init=False)  # tokens before this one are the base's

    def __post_init__(self) -> None:
        self.active_from = self.request.active_from

    @property
    def adapter(self) -> AdapterRef | None:
        return self.request.adapter

    @property
    def virtual_tokens(self) -> int:
        """Tokens of its adapter that stand before its own, in the cache and in position."""
        return self.adapter.virtual_tokens if self.adapter else 0

    @property
    def vocabulary(self) -> int:
        """Tokens that it may hold and logits that are its own; 0: as many as the base's."""
        return self.adapter.vocabulary if self.adapter else 0

    @property
    def generated(self) -> int:
        """Number of output tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def prefilled(self) -> bool:
        """The whole prompt is in the cache."""
        return self.computed >= self.prompt_length

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED
