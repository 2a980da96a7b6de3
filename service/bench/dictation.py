"""Dictation: a guide that allows one text only. A model of random weights quotes nothing of its
own, so what it is to say, and prompt lookup to guess, is said to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, cast

from service.engine.guide import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Dictation:
    """In a matcher's place: the tokens one after the other, then nothing more."""

    def __init__(self, answer: Sequence[int], at: int = 0) -> None:
        self._answer = answer
        self._at = at

    def guide(self) -> Guide:
        """As a request takes it."""
        return Guide(cast("LLMatcher", self))

    def deep_copy(self) -> Self:
        return type(self)(self._answer, self._at)

    def compute_bitmask(self) -> bytes:
        """One bit for each token of the vocabulary, as far as the one that comes next."""
        token = self._answer[self._at]
        return bytes(token // 8) + bytes([1 << token % 8])

    def consume_token(self, token: int) -> bool:
        right = token == self._answer[self._at]
        self._at += right
        return right

    def is_stopped(self) -> bool:
        return self._at == len(self._answer)

    def is_error(self) -> bool:
        return False

    def get_error(self) -> str:
        return ""
