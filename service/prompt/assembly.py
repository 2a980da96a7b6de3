"""Prompt assembly: what a user wrote -> the token ids that the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from adapters.template import RenderedChat, render, text_ids
from adapters.vocabulary import Tokens
from service.engine.vocabulary import Vocabulary
from service.errors import InvalidRequest
from service.prompt.own_tokenizer import OwnTokenizers
from service.selection import Selection

P = ParamSpec("P")
T = TypeVar("T")

LONG_TEXT = 2000  # characters; what is longer is tokenized off the event loop


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a text, and the characters [start, stop) that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class Assembly:
    """Turns texts and chats into token ids with the base's tokenizer. Thread-safe."""

    def __init__(
        self,
        tokenizer: Any,
        max_model_len: int,
        own: OwnTokenizers | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`own` reads the tokenizers of adapters; `vocabulary` is that of the one whose this is,
        None for the base's."""
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocabulary = vocabulary
        self._own = own
        # The first call may change the tokenizer's truncation; all later ones only read it.
        tokenizer("x")

    @cached_property
    def tokens(self) -> Tokens:
        """What the checks of an upload compare its tokenizer with."""
        return Tokens.of(self.tokenizer)

    async def of(self, selection: Selection | None) -> Assembly:
        """With the tokenizer of the adapter that was selected, if it has its own."""
        if selection is None or self._own is None or not selection.single:
            return self  # what has a tokenizer of its own is never part of a sum
        manifest = selection.parts[0].manifest
        if manifest.tokenizer_sha256 is None:
            return self
        vocabulary = await asyncio.to_thread(self._own.of, manifest)
        if vocabulary is None:
            return self
        return Assembly(vocabulary.tokenizer, self.max_model_len, vocabulary=vocabulary)

    async def text(
        self, text: str, truncate: int | None = None, before: str = ""
    ) -> tuple[int, ...]:
        """Token ids of a plain prompt, the base's special tokens around it.

        `before` is a text of others in front of it: no control token comes of that.
        """
        if truncate is None:
            self._refuse_hopeless(len(text))
        ids = await _aside(len(text) + len(before), self._text, text, before)
        return _last(ids, truncate)

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        template: str | None = None,
        truncate: int | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        answer: str = "",
    ) -> tuple[int, ...]:
        """Token ids of a chat that ends where the assistant's turn begins, with `answer` in it.

        `template` is the adapter's own; None takes the base's.
        """
        made = await self.rendered(messages, template, truncate, tools, answer)
        return _last(made.ids, truncate)

    async def rendered(
        self,
        messages: Sequence[dict[str, Any]],
        template: str | None = None,
        truncate: int | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        answer: str = "",
    ) -> RenderedChat:
        """`chat` with its text, and whole."""
        length = sum(len(message["content"]) for message in messages) + len(answer)
        if truncate is None:
            self._refuse_hopeless(length)
        # An adapter's template is somebody's program: never on the event loop.
        weight = length if template is None and not tools else max(length, LONG_TEXT)
        return await _aside(
            weight, render, self.tokenizer, messages, template, tools=tools, answer=answer
        )

    async def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text with their places in it, without special tokens."""
        return await _aside(len(text), self._pieces, text)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text."""
        return [str(self.tokenizer.decode([token])) for token in ids]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of some tokens together."""
        return str(self.tokenizer.decode(list(ids)))

    def _text(self, text: str, before: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text)
        if not before:
            return ids
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        starts = range(len(ids) - len(bare) + 1)
        at = next((i for i in starts if ids[i : i + len(bare)] == bare), 0)
        return [*ids[:at], *text_ids(self.tokenizer, before), *ids[at:]]

    def _pieces(self, text: str) -> list[Piece]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [Piece(token, text[start:stop], start, stop) for token, (start, stop) in places]

    def _refuse_hopeless(self, characters: int) -> None:
        """Refuse what cannot fit even if every token were the longest one, before any work."""
        fewest = -(-characters // self._longest)
        if fewest >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {characters} characters, at least {fewest} tokens; prompt and "
                f"output together have room for {self.max_model_len} tokens",
                "inputs",
            )

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token, at least 1."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1) or 1


async def _aside(characters: int, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run at once when it is short, in a thread when it is long."""
    if characters < LONG_TEXT:
        return work(*arguments, **named)
    return await asyncio.to_thread(work, *arguments, **named)


def _last(ids: Sequence[int], count: int | None) -> tuple[int, ...]:
    """The last `count` tokens: of a prompt that is too long, the end matters most."""
    return tuple(ids if count is None else ids[-count:])
