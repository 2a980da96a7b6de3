"""Turns a growing list of token ids into text, piece by piece, and finds stop strings in it."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "�"


class Detokenizer:
    """The text of one sequence's output.

    A piece is held back while a character is incomplete or while it could begin a stop string, so
    that text that was sent is never taken back. The pieces join to the whole text.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._from = 0  # decoding starts here, to give the tokenizer some context
        self._read = 0  # tokens before this one are in the text
        self.text = ""  # everything decoded so far, held back or not
        self.sent = 0  # characters of it that were handed out
        self.stopped = False

    def push(self, token: int, hidden: bool = False) -> str:
        """One more token; returns the text that is certain now. `hidden` tokens have no text."""
        if hidden:
            self._settle()
            return self._hand_out(self._certain())
        self._ids.append(token)
        known = self._decode(self._from, self._read)
        text = self._decode(self._from, len(self._ids))
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < 4:
            return ""  # a byte-level token may end within a character; four bytes end it
        self._append(text[len(known) :])
        return self._hand_out(self._certain())

    def finish(self) -> str:
        """No more tokens: whatever was held back."""
        self._settle()
        return self._hand_out(len(self.text))

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _settle(self) -> None:
        """Take over a last incomplete character as it is."""
        if self._read < len(self._ids):
            known = self._decode(self._from, self._read)
            self._append(self._decode(self._from, len(self._ids))[len(known) :])

    def _append(self, piece: str) -> None:
        self._from, self._read = self._read, len(self._ids)
        if self.stopped:
            return
        searched = max(len(self.text) - max((len(s) for s in self._stop), default=0), self.sent)
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _certain(self) -> int:
        """Length of the text that no stop string can claim any more."""
        if self.stopped:
            return len(self.text)
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text) - self.sent), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return len(self.text) - longest

    def _hand_out(self, end: int) -> str:
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece
