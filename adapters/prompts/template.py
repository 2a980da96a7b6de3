"""A prompt template: a definition's parts, and what makes one definition another.

    name: support                    # not a part of the content, nor of its hash
    variables:
      product: {type: string, max_length: 80}
      tone: {type: enum, values: [calm, brisk], default: calm}
    system: You answer for {{ product }} in a {{ tone }} tone.
    examples:
      - user: Is it waterproof?
        assistant: Yes, down to 30 metres.
    user: "{{ passages }}{{ input }}"
    assistant: ""                    # how the answer begins
    sampling: {temperature: 0.3, max_new_tokens: 64}
    adapter: support@prod            # where a request names none

`input` is what a request asks, `passages` the place of what retrieval finds. No torch, no jinja2:
see `filling`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml  # type: ignore[import-untyped]

from adapters.compose import MAX_PARTS, parse_terms
from adapters.errors import InvalidAdapter, InvalidTemplate
from adapters.limits import KIB
from adapters.prompts.variables import Variable, parse_variable, text_of

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_VARIABLES = 64
MAX_EXAMPLES = 64
MAX_PART = 64 * KIB  # characters of one part's source
MAX_DEFINITION = 256 * KIB  # bytes of the whole, as JSON
MAX_ADAPTER = 200 * MAX_PARTS
MAX_DESCRIPTION = 2000
MAX_STOPS = 16
MAX_STOP = 256
# fmt: off
FIELDS = (
    "description", "variables", "system", "examples", "user", "assistant", "sampling", "adapter",
)
# fmt: on
# Names and bounds of /generate's parameters.
NUMBERS: Mapping[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, 1 << 20),
    "min_new_tokens": (int, 0, 1 << 20),
    "temperature": (float, 0.01, 100),
    "top_k": (int, 0, 1 << 20),
    "top_p": (float, 1e-6, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
}
SWITCHES = ("do_sample",)
SAMPLING = (*NUMBERS, *SWITCHES, "stop")


@dataclass(frozen=True)
class PromptTemplate:
    """One definition, checked but for its Jinja. Equal contents have equal digests."""

    user: str
    system: str = ""
    assistant: str = ""
    examples: tuple[tuple[str, str], ...] = ()  # (user, assistant)
    variables: tuple[Variable, ...] = ()
    sampling: Mapping[str, Any] | None = None
    adapter: str | None = None
    description: str = ""

    @cached_property
    def sources(self) -> dict[str, str]:
        """The source of every part, by its place in the definition."""
        found = {"system": self.system} if self.system else {}
        for number, (user, assistant) in enumerate(self.examples):
            found[f"examples.{number}.user"] = user
            found[f"examples.{number}.assistant"] = assistant
        found["user"] = self.user
        return found | ({"assistant": self.assistant} if self.assistant else {})

    def plain(self) -> dict[str, Any]:
        """The definition as it is written down, without a name; what is empty is left out."""
        found: dict[str, Any] = {
            "description": self.description,
            "variables": {variable.name: variable.plain() for variable in self.variables},
            "system": self.system,
            "examples": [{"user": u, "assistant": a} for u, a in self.examples],
            "user": self.user,
            "assistant": self.assistant,
            "sampling": dict(self.sampling or {}),
            "adapter": self.adapter,
        }
        return {field: value for field, value in found.items() if value}

    @cached_property
    def canonical(self) -> str:
        """One text for one content. The order of variables is no part of it."""
        return json.dumps(
            self.plain(), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    @cached_property
    def digest(self) -> str:
        """sha-256 of the content."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def as_yaml(self) -> str:
        """As a file has it, for people and for diffs."""
        plain = self.plain()
        return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def parse_template(given: Any) -> PromptTemplate:
    """A definition from a mapping, without its name. Raises InvalidTemplate."""
    if not isinstance(given, Mapping):
        raise InvalidTemplate(f"is a {type(given).__name__}; a mapping is needed")
    given = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(map(str, given.keys() - set(FIELDS)))
    if unknown:
        raise InvalidTemplate(f"there is no such field; there are {', '.join(FIELDS)}", unknown[0])
    if "user" not in given:
        raise InvalidTemplate(
            "is required: what the user's turn says, such as '{{ input }}'", "user"
        )
    made = PromptTemplate(
        user=text_of(given["user"], MAX_PART, "user"),
        system=text_of(given.get("system", ""), MAX_PART, "system"),
        assistant=text_of(given.get("assistant", ""), MAX_PART, "assistant"),
        examples=_examples(given.get("examples", [])),
        variables=_variables(given.get("variables", {})),
        sampling=_sampling(given.get("sampling", {})),
        adapter=_adapter(given.get("adapter")),
        description=text_of(given.get("description", ""), MAX_DESCRIPTION, "description"),
    )
    if not made.user.strip():
        raise InvalidTemplate("is empty", "user")
    if (size := len(made.canonical.encode())) > MAX_DEFINITION:
        raise InvalidTemplate(f"has {size} bytes; at most {MAX_DEFINITION}")
    return made


def parse_file(content: bytes, where: str) -> tuple[str | None, PromptTemplate]:
    """(name, definition) of a YAML file. Raises InvalidTemplate, which names the file."""
    if len(content) > 2 * MAX_DEFINITION:
        raise InvalidTemplate(f"has {len(content)} bytes; at most {2 * MAX_DEFINITION}", where)
    try:
        given = yaml.load(content, Loader=_Loader)  # a SafeLoader
        if not isinstance(given, dict):
            raise InvalidTemplate(f"is a {type(given).__name__}; a mapping is needed")
        name = given.pop("name", None)
        return (None if name is None else check_name(name)), parse_template(given)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InvalidTemplate(f"not YAML: {' '.join(str(error).split())[:300]}", where) from None
    except InvalidTemplate as error:
        raise InvalidTemplate(str(error), where) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Without aliases: a few of them make gigabytes of nothing."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*) are not allowed")
        return super().compose_node(parent, index)


def check_name(name: Any, where: str = "name") -> str:
    """The name itself, when it is one. Raises InvalidTemplate."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidTemplate(
            f"{str(name)[:80]!r}, expected 1 to 64 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or a digit",
            where,
        )
    return name


def _variables(given: Any) -> tuple[Variable, ...]:
    if not isinstance(given, Mapping):
        raise InvalidTemplate("name: {type, …} is needed", "variables")
    if len(given) > MAX_VARIABLES:
        raise InvalidTemplate(f"{len(given)}; at most {MAX_VARIABLES}", "variables")
    return tuple(parse_variable(name, one) for name, one in given.items())


def _examples(given: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list):
        raise InvalidTemplate("a list of {user, assistant} is needed", "examples")
    if len(given) > MAX_EXAMPLES:
        raise InvalidTemplate(f"{len(given)}; at most {MAX_EXAMPLES}", "examples")
    found = []
    for number, one in enumerate(given):
        where = f"examples.{number}"
        if not isinstance(one, Mapping) or set(one) != {"user", "assistant"}:
            raise InvalidTemplate("user and assistant are needed, and nothing else", where)
        texts = (text_of(one[part], MAX_PART, f"{where}.{part}") for part in ("user", "assistant"))
        found.append((next(texts), next(texts)))
    return tuple(found)


def _adapter(given: Any) -> str | None:
    if given is None:
        return None
    text = text_of(given, MAX_ADAPTER, "adapter")
    try:
        parse_terms(text)
    except InvalidAdapter as error:
        raise InvalidTemplate(error.reason, "adapter") from None
    return text


def _sampling(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidTemplate("name: value is needed, as in /generate's parameters", "sampling")
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        where = f"sampling.{name}"
        if name not in SAMPLING:
            raise InvalidTemplate(f"there is no such default; {', '.join(SAMPLING)}", where)
        if name == "stop":
            _check_stops(value, where)
        elif name in SWITCHES:
            if not isinstance(value, bool):
                raise InvalidTemplate(f"is {repr(value)[:60]}; true or false is needed", where)
        else:
            _check_number(name, value, where)
    if found.get("min_new_tokens", 0) > found.get("max_new_tokens", 1 << 20):
        raise InvalidTemplate("is more than max_new_tokens", "sampling.min_new_tokens")
    return found


def _check_number(name: str, value: Any, where: str) -> None:
    kind, least, most = NUMBERS[name]
    wanted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise InvalidTemplate(
            f"is {repr(value)[:60]}; {what} from {least:g} to {most:g} is needed", where
        )


def _check_stops(value: Any, where: str) -> None:
    texts = isinstance(value, list) and all(
        isinstance(one, str) and 1 <= len(one) <= MAX_STOP for one in value
    )
    if not texts or len(value) > MAX_STOPS:
        raise InvalidTemplate(
            f"at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters are needed", where
        )
