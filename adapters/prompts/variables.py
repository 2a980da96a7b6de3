"""The variables of a prompt template: what each may be, and whether given values are that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import InvalidTemplate, InvalidVariables

TYPES = ("string", "integer", "number", "boolean", "enum", "list")
Value = str | int | float | bool | list[str]

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# What a template has without declaring it, and words that Jinja keeps for itself.
GIVEN = ("input", "passages")
RESERVED = frozenset(GIVEN) | {
    *("true", "false", "none", "and", "or", "not", "in", "is", "if", "else", "loop", "self"),
    *("super", "caller", "varargs", "kwargs", "range", "dict", "namespace"),
}
MAX_LENGTH = 100_000  # characters of a text
DEFAULT_LENGTH = 10_000
MAX_ITEMS = 1000
DEFAULT_ITEMS = 100
MAX_NUMBER = 2**53  # beyond it JSON's readers differ
MAX_VALUES = 200
MAX_DESCRIPTION = 1000


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable. Without a value and a default it is undefined, which prints as nothing."""

    name: str
    type: str
    required: bool
    default: Value | None = None
    max_length: int = DEFAULT_LENGTH  # characters: of a string, of each item of a list
    max_items: int = DEFAULT_ITEMS  # of a list
    minimum: float = -MAX_NUMBER
    maximum: float = MAX_NUMBER
    values: tuple[str, ...] = ()  # of an enum
    example: Value | None = None
    description: str = ""

    def checked(self, value: Any, where: str) -> Value:
        """The value, when it is one. Raises InvalidVariables, which names `where`."""
        reason = self._wrong(value)
        if reason is not None:
            raise InvalidVariables(reason, where)
        return list(value) if isinstance(value, list) else value

    def sample(self) -> Value:
        """A value to try the template with."""
        for known in (self.example, self.default):
            if known is not None:
                return known
        text = "text"[: self.max_length]
        number = min(max(1, math.ceil(self.minimum)), math.floor(self.maximum))
        samples: dict[str, Value] = {
            "integer": number,
            "number": min(max(1.0, self.minimum), self.maximum),
            "boolean": True,
            "enum": self.values[0] if self.values else "",
            "list": [text] * min(2, self.max_items),
        }
        return samples.get(self.type, text)

    def _wrong(self, value: Any) -> str | None:
        """What is wrong, without the value: a client's words are a part of its prompt."""
        kind = type(value).__name__
        if self.type in ("integer", "number"):
            return self._wrong_number(value, kind)
        if self.type == "boolean":
            return None if isinstance(value, bool) else f"is a {kind}; true or false is needed"
        if self.type == "enum":
            known = isinstance(value, str) and value in self.values
            wrong = "is none of its values" if isinstance(value, str) else f"is a {kind}"
            return None if known else f"{wrong}; one of {', '.join(self.values)} is needed"
        if self.type == "list":
            return self._wrong_list(value, kind)
        return self._wrong_text(value, "")

    def _wrong_number(self, value: Any, kind: str) -> str | None:
        whole = self.type == "integer"
        wanted = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            return f"is a {kind}; {'a whole number' if whole else 'a number'} is needed"
        if not self.minimum <= value <= self.maximum:  # NaN is not, either
            return f"is out of bounds; from {self.minimum:g} to {self.maximum:g} is needed"
        return None

    def _wrong_list(self, value: Any, kind: str) -> str | None:
        if not isinstance(value, list):
            return f"is a {kind}; a list of texts is needed"
        if len(value) > self.max_items:
            return f"has {len(value)} items; at most {self.max_items}"
        wrong = (self._wrong_text(item, f"item {i} ") for i, item in enumerate(value))
        return next((reason for reason in wrong if reason is not None), None)

    def _wrong_text(self, value: Any, what: str) -> str | None:
        if not isinstance(value, str):
            return f"{what}is a {type(value).__name__}; a text is needed"
        if len(value) > self.max_length:
            return f"{what}has {len(value)} characters; at most {self.max_length}"
        return None

    def plain(self) -> dict[str, Any]:
        """As it is written down: what is as usual is left out."""
        found: dict[str, Any] = {"type": self.type}
        if self.required != (self.default is None):
            found["required"] = self.required
        usual = Variable("", self.type, True)
        for field in _FIELDS:
            value = getattr(self, field)
            if value != getattr(usual, field):
                found[field] = list(value) if isinstance(value, tuple) else value
        return found


# fmt: off
_FIELDS = (
    "default", "max_length", "max_items", "minimum", "maximum", "values", "example", "description",
)
# fmt: on
# Which fields a type has, beside those that all have.
_OF_TYPE = {
    "string": {"max_length"},
    "integer": {"minimum", "maximum"},
    "number": {"minimum", "maximum"},
    "boolean": set(),
    "enum": {"values"},
    "list": {"max_length", "max_items"},
}
_OF_ALL = {"type", "required", "default", "example", "description"}


def parse_variable(name: Any, given: Any) -> Variable:
    """A variable from its definition: a mapping, or its type alone. Raises InvalidTemplate."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
        raise InvalidTemplate(
            f"{str(name)[:60]!r} cannot name a variable: 1 to 40 of a-z, 0-9 and _, beginning with "
            f"a letter, and none of {', '.join(sorted(RESERVED))}",
            "variables",
        )
    where = f"variables.{name}"
    fields = {"type": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping):
        raise InvalidTemplate(f"is a {type(given).__name__}; type and bounds are needed", where)
    kind = fields.get("type", "string")
    if kind not in TYPES:
        raise InvalidTemplate(f"{str(kind)[:40]!r}; one of {', '.join(TYPES)}", f"{where}.type")
    unknown = sorted(map(str, set(fields) - _OF_ALL - _OF_TYPE[kind]))
    if unknown:
        known = ", ".join(sorted(_OF_ALL | _OF_TYPE[kind]))
        raise InvalidTemplate(f"a variable of type {kind} has {known}", f"{where}.{unknown[0]}")
    made = Variable(
        name,
        kind,
        _flag(fields.get("required", fields.get("default") is None), f"{where}.required"),
        max_length=_whole(fields, "max_length", 1, MAX_LENGTH, DEFAULT_LENGTH, where),
        max_items=_whole(fields, "max_items", 0, MAX_ITEMS, DEFAULT_ITEMS, where),
        minimum=_bound(fields, "minimum", -MAX_NUMBER, where),
        maximum=_bound(fields, "maximum", MAX_NUMBER, where),
        values=_values(fields.get("values"), where) if kind == "enum" else (),
        description=text_of(fields.get("description", ""), MAX_DESCRIPTION, f"{where}.description"),
    )
    if made.minimum > made.maximum:
        raise InvalidTemplate(f"is more than maximum, {made.maximum:g}", f"{where}.minimum")
    return _with_values(made, fields, where)


def _with_values(made: Variable, fields: Mapping[str, Any], where: str) -> Variable:
    found: dict[str, Any] = {}
    for field in ("default", "example"):
        if fields.get(field) is not None:
            try:
                found[field] = made.checked(fields[field], f"{where}.{field}")
            except InvalidVariables as error:
                raise InvalidTemplate(error.reason, error.where) from None
    if made.required and "default" in found:
        raise InvalidTemplate("what is required has no default", f"{where}.default")
    return replace(made, **found)


def checked_values(
    variables: Sequence[Variable], given: Mapping[str, Any], where: str = "variables"
) -> dict[str, Value]:
    """The values of all variables, defaults filled in; those that stay undefined are left out.

    Raises InvalidVariables, which names the variable.
    """
    known = {variable.name for variable in variables}
    unknown = sorted(map(str, given.keys() - known))
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise InvalidVariables(
            f"there is no such variable; the template has {names}", f"{where}.{unknown[0][:60]}"
        )
    found: dict[str, Value] = {}
    for variable in variables:
        place = f"{where}.{variable.name}"
        if variable.name in given:
            found[variable.name] = variable.checked(given[variable.name], place)
        elif variable.default is not None:
            found[variable.name] = variable.default
        elif variable.required:
            raise InvalidVariables(f"is required: a value of type {variable.type}", place)
    return found


def text_of(value: Any, limit: int, where: str) -> str:
    """A text of a definition. Raises InvalidTemplate."""
    if not isinstance(value, str):
        raise InvalidTemplate(f"is a {type(value).__name__}; a text is needed", where)
    if len(value) > limit:
        raise InvalidTemplate(f"has {len(value)} characters; at most {limit}", where)
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidTemplate(f"is {repr(value)[:60]}; true or false is needed", where)
    return value


def _whole(
    fields: Mapping[str, Any], field: str, least: int, most: int, usual: int, where: str
) -> int:
    value = fields.get(field, usual)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidTemplate(
            f"is {repr(value)[:60]}; a whole number from {least} to {most} is needed",
            f"{where}.{field}",
        )
    return value


def _bound(fields: Mapping[str, Any], field: str, usual: float, where: str) -> float:
    value = fields.get(field, usual)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise InvalidTemplate(
            f"is {repr(value)[:60]}; a number within 2^53 is needed", f"{where}.{field}"
        )
    return float(value) if isinstance(value, float) else int(value)


def _values(given: Any, where: str) -> tuple[str, ...]:
    place = f"{where}.values"
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_VALUES:
        raise InvalidTemplate(f"1 to {MAX_VALUES} texts are needed", place)
    found = tuple(text_of(value, 200, place) for value in given)
    if len(set(found)) < len(found):
        raise InvalidTemplate("a value stands there twice", place)
    return found
