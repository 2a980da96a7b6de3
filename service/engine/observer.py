"""What the engine tells the outside about itself; the metrics implement it. No torch here.

All methods but `adapter_refused` are called from the engine's thread; all must return at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from service.engine.request import AdapterKey, Finished


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the engine, after it ran."""

    running: int  # sequences that hold blocks
    waiting: int  # sequences that do not
    blocks_used: int
    blocks_total: int
    prompt_tokens: int  # prompt tokens computed in this step
    generated_tokens: int
    preempted: int  # sequences that gave their blocks back in this step
    prefix_queried: int  # prompt tokens looked up in the prefix cache
    prefix_hit: int  # of these, tokens found there
    seconds: float
    drafts: int = 0  # sequences that were given a draft in this step
    draft_tokens: int = 0
    accepted_tokens: int = 0
    replayed: bool | None = None  # a captured step was replayed; None: there are none
    running_adapters: tuple[str, ...] = ()  # names, of running sequences
    waiting_adapters: tuple[str, ...] = ()


class Observer(Protocol):
    """Receives what happens in the engine.

    adapter_sought   a sequence came, and its adapter was in this tier: slot, host, or only store
    adapter_loaded   from the store to memory in `seconds`, `queued` of them before it began
    adapter_refused  too many loads were under way; this one is called from any thread
    """

    def stepped(self, report: StepReport) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, end: Finished, seconds: float) -> None: ...
    def adapter_sought(self, name: str, tier: str) -> None: ...
    def adapter_loaded(
        self, key: AdapterKey, seconds: float, nbytes: int, queued: float
    ) -> None: ...
    def adapter_failed(self, name: str) -> None: ...
    def adapter_refused(self, name: str) -> None: ...
    def adapter_evicted(self, digest: str, tier: str) -> None: ...


class Silent:
    """An observer that keeps nothing."""

    def stepped(self, report: StepReport) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, end: Finished, seconds: float) -> None: ...
    def adapter_sought(self, name: str, tier: str) -> None: ...
    def adapter_loaded(
        self, key: AdapterKey, seconds: float, nbytes: int, queued: float
    ) -> None: ...
    def adapter_failed(self, name: str) -> None: ...
    def adapter_refused(self, name: str) -> None: ...
    def adapter_evicted(self, digest: str, tier: str) -> None: ...
