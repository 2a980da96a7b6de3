"""What an output must look like: a compiled grammar, and one output's way through it.

A guide is compiled once (`service.grammars`) and shared; each sequence walks a copy. The walk is
with the sequence, so it stands where the tokens stand, after a preemption too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """A grammar over the tokens of one vocabulary, at its start."""

    matcher: LLMatcher

    def start(self) -> Walk:
        """A walk of its own for one output."""
        return Walk(self.matcher.deep_copy())


class Walk:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """[vocabulary] bool: the tokens that may come next, ends of the sequence among them.

        None of them where the grammar failed, or is past its bounds: see `fault`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, count=vocabulary, bitorder="little").astype(np.bool_)
        return found & np.bool_(not self._matcher.is_error())

    def advance(self, token: int) -> bool:
        """Take the token; False when it was not allowed: the walk is over then."""
        return self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """The output satisfies the grammar, and nothing can be added to it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        """Why it failed, in one line; empty while it has not."""
        return self._matcher.get_error().partition("\n")[0][:200]
