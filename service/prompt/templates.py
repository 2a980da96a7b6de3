"""Prompt templates at work: a request's name and variables, filled into a chat."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidTemplate, InvalidVariables
from adapters.prompts.filling import filled_chat
from adapters.prompts.shelf import StoredTemplate, TemplateShelf
from adapters.prompts.variables import checked_values
from adapters.prompts.worker import Renderer
from service.errors import InvalidRequest

Messages = list[dict[str, Any]]
FIELD = "template"  # of a request, in every skin


@dataclass(frozen=True, slots=True)
class TemplateAsked:
    """A request's `template`: never its source, only which one and with what."""

    name: str
    version: int | None
    variables: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateChat:
    """What came of it. `slotted` is the chat with SLOT where passages belong, if it has a place."""

    stored: StoredTemplate
    messages: Messages
    slotted: Messages | None
    answer: str  # how the assistant's turn begins


class Templates:
    """The shelf, and the processes that fill what stands there. Thread-safe."""

    def __init__(self, shelf: TemplateShelf, renderer: Renderer | None = None) -> None:
        self.shelf = shelf
        self.renderer = renderer or Renderer()

    def of(self, tenant: str) -> Templates:
        """As this tenant sees them."""
        return Templates(self.shelf.of(tenant), self.renderer)

    def close(self) -> None:
        self.renderer.close()

    async def chat(
        self,
        asked: TemplateAsked,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        passages: bool = False,
        field: str = FIELD,
        input_field: str = "inputs",
    ) -> TemplateChat:
        """The chat of a template, for what `messages` ask (none: nothing).

        Raises TemplateNotFound, and InvalidRequest, which names what is at fault below `field`, or
        `input_field`.
        """
        return await asyncio.to_thread(self._chat, asked, messages, passages, field, input_field)

    def _chat(
        self,
        asked: TemplateAsked,
        messages: Sequence[Mapping[str, Any]],
        passages: bool,
        field: str,
        input_field: str,
    ) -> TemplateChat:
        try:
            stored = self.shelf.get(asked.name, asked.version)
        except InvalidTemplate as error:
            raise InvalidRequest(error.reason, below(field, error.where)) from error
        try:
            values = checked_values(stored.template.variables, asked.variables)
            fill = self.renderer.fill
            found, history = filled_chat(stored.template, values, messages, fill)
            slotted = None
            if passages:
                open_, _ = filled_chat(stored.template, values, messages, fill, passages=True)
                slotted = open_.messages(history) if open_.slotted else None
        except InvalidVariables as error:
            place = input_field if error.where == "input" else below(field, error.where)
            raise InvalidRequest(f"{place}: {error.reason}", place) from error
        except InvalidTemplate as error:
            raise InvalidRequest(f"template {stored}: {error}", field or None) from error
        return TemplateChat(stored, found.messages(history), slotted, found.answer)


def below(field: str, where: str | None) -> str:
    """('template', 'variables.x') -> 'template.variables.x'."""
    return ".".join(filter(None, (field, where)))
