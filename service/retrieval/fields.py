"""The typed metadata of a collection's documents, and filters on it.

A collection declares its fields when it is made: {"year": "integer", "language": "string"}. A
filter is JSON:

    {"language": "en", "year": {"gte": 2020, "lt": 2024}}          all of them
    {"any": [{"language": "en"}, {"not": {"year": 2020}}]}
    {"document": {"in": ["guide.md", "faq.md"]}}                   by document

It is read into conditions over declared fields and typed values first, and those become an
expression of the store. No text of a client is ever part of a query language.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, get_args

from service.errors import InvalidRequest
from service.retrieval.errors import installed
from service.retrieval.passage import Value, key_of

FieldType = Literal["string", "integer", "number", "boolean", "date"]
Operator = Literal["eq", "ne", "lt", "lte", "gt", "gte", "in"]

MAX_FIELDS = 32
MAX_TEXT = 1024  # characters of one value
MAX_INTEGER = (1 << 63) - 1
MAX_CONDITIONS = 64
MAX_VALUES = 256  # of one `in`
MAX_DEPTH = 8
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}\Z")
RESERVED = frozenset({"all", "any", "not", "document"})
PREFIX = "f_"  # of a field's column, so that no field can be one of ours


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a declared field, or of the document's key."""

    column: str
    operator: Operator
    values: tuple[Value, ...]  # one, or several for `in`


@dataclass(frozen=True, slots=True)
class Group:
    """Conditions that must all hold, of which any must hold, or (one) that must not hold."""

    how: Literal["all", "any", "not"]
    parts: tuple[Condition | Group, ...]


def check_fields(fields: Mapping[str, str]) -> dict[str, FieldType]:
    """The declaration of a collection's fields. Raises InvalidRequest."""
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"{len(fields)} fields; at most {MAX_FIELDS}", "fields")
    found: dict[str, FieldType] = {}
    for name, kind in fields.items():
        where = f"fields.{name[:60]}"
        if not NAME.match(name) or name in RESERVED:
            reserved = ", ".join(sorted(RESERVED))
            raise InvalidRequest(
                "a field's name has small letters, digits and _, begins with a letter, has at "
                f"most 40 characters, and is none of {reserved}",
                where,
            )
        if kind not in get_args(FieldType):
            raise InvalidRequest(
                f"{str(kind)[:40]!r} is no type; types are {', '.join(get_args(FieldType))}", where
            )
        found[name] = kind  # type: ignore[assignment]
    return found


def check_metadata(
    given: Mapping[str, Any], fields: Mapping[str, FieldType], where: str = "metadata"
) -> dict[str, Value]:
    """A document's values, each of its field's type; a null counts as left out.

    Raises InvalidRequest.
    """
    found: dict[str, Value] = {}
    for name, value in given.items():
        if name not in fields:
            raise InvalidRequest(_unknown(name, fields), f"{where}.{name[:60]}")
        if value is not None:
            found[name] = _typed(value, fields[name], f"{where}.{name}")
    return found


def parse_filter(given: Any, fields: Mapping[str, FieldType]) -> Group | None:
    """A client's filter, understood and typed. Raises InvalidRequest naming the place."""
    if given is None or given == {}:
        return None
    return _Reader(fields).group(given, "filter", 0)


def expression(found: Group) -> Any:
    """The filter as an expression of the store, built from its own parts."""
    parts = [expression(p) if isinstance(p, Group) else _comparison(p) for p in found.parts]
    if found.how == "not":
        return ~parts[0]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part if found.how == "all" else whole | part
    return whole


def _comparison(condition: Condition) -> Any:
    expr = installed("lancedb.expr")
    column = expr.col(condition.column)
    if condition.operator == "in":
        return column.isin([expr.lit(value) for value in condition.values])
    return getattr(column, condition.operator)(expr.lit(condition.values[0]))


def _unknown(name: str, fields: Mapping[str, FieldType]) -> str:
    known = ", ".join(sorted(fields)) or "none: declare them when you create the collection"
    return f"the collection has no field {name[:60]!r}; its fields are {known}"


class _Reader:
    """Reads one filter, counting what it has read."""

    def __init__(self, fields: Mapping[str, FieldType]) -> None:
        self.fields = fields
        self.conditions = 0

    def group(self, given: Any, where: str, depth: int) -> Group:
        if not isinstance(given, dict) or not given:
            raise InvalidRequest('should be an object such as {"language": "en"}', where)
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"nested deeper than {MAX_DEPTH}", where)
        parts: list[Condition | Group] = []
        for name, value in given.items():
            here = f"{where}.{name[:60]}"
            if name in ("all", "any"):
                parts.append(self._several(name, value, here, depth))
            elif name == "not":
                parts.append(Group("not", (self.group(value, here, depth + 1),)))
            else:
                parts += self._compared(name, value, here)
        return Group("all", tuple(parts))

    def _several(self, how: Any, given: Any, where: str, depth: int) -> Group:
        if not isinstance(given, list) or not 1 <= len(given) <= MAX_CONDITIONS:
            raise InvalidRequest(f"should be a list of 1 to {MAX_CONDITIONS} filters", where)
        parts = [self.group(one, f"{where}.{i}", depth + 1) for i, one in enumerate(given)]
        return Group(how, tuple(parts))

    def _compared(self, name: str, given: Any, where: str) -> list[Condition]:
        if name != "document" and name not in self.fields:
            raise InvalidRequest(_unknown(name, self.fields), where)
        asked = given if isinstance(given, dict) else {"eq": given}
        if not asked:
            raise InvalidRequest(f"should have one of {', '.join(get_args(Operator))}", where)
        return [self._condition(name, operator, value, where) for operator, value in asked.items()]

    def _condition(self, name: str, operator: Any, given: Any, where: str) -> Condition:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise InvalidRequest(f"more than {MAX_CONDITIONS} comparisons", "filter")
        allowed = ("eq", "ne", "in") if name == "document" else get_args(Operator)
        if operator not in allowed:
            raise InvalidRequest(
                f"{str(operator)[:40]!r} is no comparison here; there are {', '.join(allowed)}",
                where,
            )
        values: Sequence[Any] = given if operator == "in" else [given]
        if not isinstance(values, list) or not 1 <= len(values) <= MAX_VALUES:
            raise InvalidRequest(f"`in` takes a list of 1 to {MAX_VALUES} values", where)
        if name == "document":
            keys = tuple(key_of(str(_typed(value, "string", where))) for value in values)
            return Condition("key", operator, keys)
        kind = self.fields[name]
        typed = tuple(_typed(value, kind, where) for value in values)
        return Condition(PREFIX + name, operator, typed)


def _typed(value: Any, kind: FieldType, where: str) -> Value:
    """The value as its type has it. Raises InvalidRequest."""
    if kind == "boolean" and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer" and number and isinstance(value, int) and abs(value) <= MAX_INTEGER:
        return value
    if kind == "number" and number and abs(value) <= 1e300 and math.isfinite(value):
        return float(value)
    if kind == "string" and isinstance(value, str) and len(value) <= MAX_TEXT:
        if "\0" in value:
            raise InvalidRequest("a NUL character is not text", where)
        return value
    if kind == "date" and isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
    right = {
        "date": "a date as YYYY-MM-DD",
        "string": f"text of at most {MAX_TEXT} characters",
        "integer": "a whole number of 64 bits",
        "number": "a finite number",
        "boolean": "true or false",
    }[kind]
    raise InvalidRequest(f"should be {right}, is {type(value).__name__}", where)
