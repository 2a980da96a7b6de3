"""Options: what one comparison is asked for, and whom it tells how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.kernels import Precision
from service.bench.peer import Setup
from service.bench.plan import DECISIVE, NIBBLE, SLOW, Contestant
from service.bench.scenario import Scenario

Report = Callable[[str, int, int], None]  # what runs, and which of how many tries it is


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare, and on which base."""

    model: str  # as the user named it
    directory: Path
    scenarios: tuple[Scenario, ...]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    peft_dtypes: tuple[str, ...]  # the fastest of these is measured; empty: no PEFT
    precisions: tuple[Precision, ...] = ("exact",)  # of our own products over NF4, a peer for each
    slow_rounds: int | None = None  # of slow peers and further precisions; None: as many as all
    transformers: bool = False  # its continuous batching too
    gguf: Path | None = None  # where llama.cpp's weights are kept; None: no llama.cpp
    llama_server: Path | None = None  # the program; None: no servers over HTTP
    parts: tuple[str, ...] = ()  # REGISTERED and START
    minutes: float = math.inf  # after these no row begins
    isa: str = ""  # that every process is held to; "": the best that it can use
    command: str = ""

    def setup(self, adapters: Sequence[Path], **more: Any) -> Setup:
        return Setup(self.directory, tuple(adapters), self.threads, more)

    def rounds_of(self, row: Contestant) -> int:
        further = tuple(f"{NIBBLE} {precision}" for precision in self.precisions[1:])
        slow = row.peer in SLOW and row != DECISIVE
        if slow or (further and row.peer.startswith(further)):
            return min(self.rounds, self.slow_rounds or self.rounds)
        return self.rounds

    @property
    def adapters(self) -> int:
        """How many of the assortment the scenarios use."""
        used = [a for s in self.scenarios for a in s.adapters if a is not None]
        return max(used, default=0) + 1
