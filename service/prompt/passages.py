"""Passages of documents into a prompt, as quotations (`adapters/prompts/quotation.py`).

What was retrieved has no authority, and what it says cannot look as if it had: no line of a
passage begins where `[2]` or `Question:` could stand, so it cannot close its block; it is inserted
after templates are rendered, so it is no template; and where it spells a control token, the ids
spell it too, in ordinary tokens.

Passages come first and the question last, in the order of documents and places, whatever their
ranks. Two questions that find the same passages have the same beginning, and the prefix cache
computes it once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.prompts.filling import SLOT
from adapters.prompts.quotation import HEAD, LEAD, SYSTEM, asked, block, quoted
from adapters.template import text_ids
from service.errors import InvalidRequest
from service.prompt.assembly import Assembly
from service.retrieval.passage import Passage


@dataclass(frozen=True, slots=True)
class Quoted:
    """A prompt with passages in it. `shown[0]` is `[1]`; what was dropped is the best first."""

    prompt: tuple[int, ...]
    shown: tuple[Passage, ...]
    dropped: tuple[Passage, ...]
    tokens: int  # that the passages added to the prompt
    messages: tuple[Mapping[str, Any], ...] = ()  # of a chat: what its template rendered


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat, the adapter's own template and the functions that a template may show.

    `slotted` is the chat as a prompt template has it, with SLOT where passages belong; without it
    they go before the user's last message. `answer` is how the assistant's turn begins.
    """

    messages: Sequence[Mapping[str, Any]]
    template: str | None = None
    tools: Sequence[dict[str, Any]] | None = None
    slotted: Sequence[Mapping[str, Any]] | None = None
    answer: str = ""


def question_of(prompt: str | Chat) -> str:
    """What a prompt asks: the text, or the last message of the user. Raises InvalidRequest."""
    return (
        prompt if isinstance(prompt, str) else str(prompt.messages[_last_user(prompt)]["content"])
    )


async def quote(
    prompt: str | Chat,
    passages: Sequence[Passage],
    assembly: Assembly,
    *,
    total: int,
    most: int | None = None,
) -> Quoted:
    """The token ids of a prompt with as many of the passages, best first, as have room.

    `total`: tokens that prompt and passages may have together; `most`: that passages may have.
    The prompt itself is never cut. Raises InvalidRequest, InvalidChat.
    """
    if isinstance(prompt, Chat):
        prompt = _instructed(prompt)
    bare = await _ids(prompt, "", assembly)
    room = max(total - len(bare), 0)
    budget = room if most is None else min(room, most)
    kept = await asyncio.to_thread(_fitting, passages, assembly, budget)
    while True:
        shown = tuple(sorted(kept, key=lambda passage: passage.place))
        text = block([passage.text for passage in shown])
        ids = await _ids(prompt, text, assembly) if shown else bare
        tokens = len(ids) - len(bare)
        if tokens <= budget or not kept:
            dropped = tuple(passage for passage in passages if passage not in kept)
            said = () if isinstance(prompt, str) else tuple(_with(prompt, text))
            return Quoted(ids, shown, dropped, tokens, said)
        kept.pop()  # the sum of the parts was a little less than the whole


def _fitting(passages: Sequence[Passage], assembly: Assembly, budget: int) -> list[Passage]:
    """In their order, each passage that still fits, by its own tokens."""
    kept: list[Passage] = []
    left = budget - len(text_ids(assembly.tokenizer, HEAD + LEAD))
    for passage in passages:
        size = len(text_ids(assembly.tokenizer, f"[{len(kept) + 1}] {quoted(passage.text)}\n"))
        if size <= left:
            kept.append(passage)
            left -= size
    return kept


async def _ids(prompt: str | Chat, shown: str, assembly: Assembly) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await assembly.text(prompt, before=f"{shown}\n\n" if shown else "")
    return await assembly.chat(
        _with(prompt, shown), prompt.template, tools=prompt.tools, answer=prompt.answer
    )


def _with(prompt: Chat, shown: str) -> list[dict[str, Any]]:
    if shown and prompt.slotted is not None:
        return [
            {**message, "content": str(message["content"]).replace(SLOT, shown)}
            for message in prompt.slotted
        ]
    messages = [dict(message) for message in prompt.messages]
    if shown:
        last = messages[_last_user(prompt)]
        last["content"] = asked(shown, str(last["content"]))
    return messages


def _instructed(chat: Chat) -> Chat:
    if chat.slotted is not None or any(m["role"] == "system" for m in chat.messages):
        return chat
    return replace(chat, messages=[{"role": "system", "content": SYSTEM}, *chat.messages])


def _last_user(chat: Chat) -> int:
    for place in range(len(chat.messages) - 1, -1, -1):
        if chat.messages[place]["role"] == "user":
            return place
    raise InvalidRequest(
        "retrieval needs a message of the user: it is what is looked for", "inputs"
    )
