"""A template's parts rendered, and the chat that they make: for serving and for training alike.

The parts become messages, and messages become tokens by `adapters.template.render`, as those of any
chat do: whatever a value or a part spells, no control token comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import InvalidTemplate, InvalidVariables
from adapters.prompts.template import PromptTemplate
from adapters.prompts.variables import GIVEN, Value, checked_values
from adapters.sandbox import fill_texts, names_in
from adapters.template import Message

MAX_FILLED = 1 << 20  # characters of all parts together
SLOT = "\ufdd0"  # stands for passages until they are there: no character, by Unicode
NO_CHARACTER = "has U+FDD0, which is no character"


@dataclass(frozen=True, slots=True)
class Filled:
    """A template's parts with values in them; SLOT where passages belong."""

    system: str
    examples: tuple[tuple[str, str], ...]
    user: str
    answer: str  # how the answer begins

    def messages(self, history: Sequence[Message] = ()) -> list[dict[str, Any]]:
        """The chat: system, examples, what was said before, and the user's turn."""
        found: list[dict[str, Any]] = []
        if self.system.strip():
            found.append({"role": "system", "content": self.system})
        for user, assistant in self.examples:
            found.append({"role": "user", "content": user})
            found.append({"role": "assistant", "content": assistant})
        return [*found, *map(dict, history), {"role": "user", "content": self.user}]

    @property
    def slotted(self) -> bool:
        """Whether passages have a place."""
        return any(SLOT in text for text in (self.system, self.user, *sum(self.examples, ())))


@dataclass(frozen=True, slots=True)
class Question:
    """What a chat asks: its last message, what was said before, and a system message if any."""

    text: str
    history: tuple[Message, ...] = ()
    system: Message | None = None


def fill(
    template: PromptTemplate,
    values: Mapping[str, Value],
    text: str | None = None,
    *,
    passages: bool = False,
) -> Filled:
    """The parts with checked values; `passages` puts SLOT where they belong.

    A program runs here: within a budget of work and of memory for texts, but not of time; see
    `worker`. Raises InvalidTemplate, whose `where` is a part.
    """
    known: dict[str, Any] = dict(values) | {"passages": SLOT if passages else ""}
    if text is not None:
        known["input"] = text
    for name, value in known.items():
        if name != "passages" and SLOT in (value if isinstance(value, str) else str(value)):
            raise InvalidVariables(NO_CHARACTER, name if name == "input" else f"variables.{name}")
    parts = fill_texts(template.sources, known)
    if (size := sum(map(len, parts.values()))) > MAX_FILLED:
        raise InvalidTemplate(f"{size} characters come of it; at most {MAX_FILLED}", "template")
    if not parts["user"].strip():
        raise InvalidTemplate("nothing comes of it with these values", "user")
    examples = tuple(
        (parts[f"examples.{number}.user"], parts[f"examples.{number}.assistant"])
        for number in range(len(template.examples))
    )
    return Filled(parts.get("system", ""), examples, parts["user"], parts.get("assistant", ""))


def takes(template: PromptTemplate, name: str) -> bool:
    """Whether a part takes `input` or `passages`."""
    return any(name in names_in(source) for source in template.sources.values())


def check(template: PromptTemplate) -> None:
    """Parse every part, and try them with sample values. Raises InvalidTemplate.

    To be called where time and memory are bounded.
    """
    declared = {variable.name for variable in template.variables}
    for place, source in template.sources.items():
        try:
            unknown = sorted(names_in(source) - declared - set(GIVEN))
        except InvalidTemplate as error:
            raise InvalidTemplate(error.reason, place) from None
        if unknown:
            names = ", ".join(sorted(declared | set(GIVEN)))
            raise InvalidTemplate(
                f"takes {', '.join(unknown)}, which variables do not declare; there are {names}",
                place,
            )
    full = {variable.name: variable.sample() for variable in template.variables}
    bare = checked_values(
        template.variables, {v.name: full[v.name] for v in template.variables if v.required}
    )
    for values in (full, bare):
        for passages in (False, True):
            fill(template, values, "text", passages=passages)


def question(messages: Sequence[Message]) -> Question:
    """What a chat asks. Raises InvalidVariables where its last message is not the user's."""
    rest = list(messages)
    system = rest.pop(0) if rest and rest[0]["role"] == "system" else None
    if not rest or rest[-1]["role"] != "user":
        raise InvalidVariables("the last message must be the user's: it is {{ input }}", "input")
    return Question(str(rest[-1]["content"]), tuple(rest[:-1]), system)


def filled_chat(
    template: PromptTemplate,
    values: Mapping[str, Value],
    messages: Sequence[Message],
    fill_parts: Any = fill,
    *,
    passages: bool = False,
) -> tuple[Filled, tuple[Message, ...]]:
    """(the parts, what was said before) for a chat that asks something, or (no messages) nothing.

    A system message of the chat takes the place of the template's where that has none, and is
    refused where it has. Raises InvalidTemplate, InvalidVariables.
    """
    asked = question(messages) if messages else None
    if any(SLOT in str(message["content"]) for message in messages):
        raise InvalidVariables(NO_CHARACTER, "input")
    wants = takes(template, "input")
    if wants and asked is None:
        raise InvalidVariables("is required: the template takes {{ input }}", "input")
    if asked is not None and not wants:
        raise InvalidVariables("the template does not take {{ input }}; leave it out", "input")
    found = fill_parts(template, values, asked.text if asked else None, passages=passages)
    if asked is not None and asked.system is not None:
        if template.system:
            raise InvalidVariables(
                "the template has a system message of its own; leave it out", "input"
            )
        found = replace(found, system=str(asked.system["content"]))
    return found, asked.history if asked else ()
