"""Definitions: read, written, hashed, refused by the field that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import InvalidTemplate, InvalidVariables
from adapters.prompts.template import MAX_PART, parse_file, parse_template
from adapters.prompts.variables import checked_values

FILE = b"""
name: support
description: Answers customers.
variables:
  product: {type: string, max_length: 8}
  tone: {type: enum, values: [calm, brisk], default: calm}
  year: {type: integer, minimum: 2000, maximum: 2100, required: false}
  score: {type: number, default: 0.5}
  short: {type: boolean, default: false}
  facts: {type: list, max_length: 5, max_items: 2, default: []}
system: You answer for {{ product }}.
examples:
  - user: Is it waterproof?
    assistant: Yes.
user: |
  {{ passages }}
  {{ input }}
assistant: "Well, "
sampling: {temperature: 0.3, max_new_tokens: 8, stop: ["!"]}
adapter: support@prod
"""


def test_a_file_is_read_and_written_again() -> None:
    name, template = parse_file(FILE, "support.yaml")
    assert name == "support"
    assert [variable.name for variable in template.variables][:2] == ["product", "tone"]
    again = parse_file(template.as_yaml().encode(), "again.yaml")
    assert again == (None, template)
    assert again[1].digest == template.digest == parse_template(template.plain()).digest


def test_the_hash_is_of_the_content() -> None:
    _, template = parse_file(FILE, "f")
    plain = template.plain()
    renamed = parse_file(FILE.replace(b"name: support", b"name: other"), "f")[1]
    assert renamed.digest == template.digest
    reordered = {**plain, "variables": dict(reversed(plain["variables"].items()))}
    assert parse_template(reordered).digest == template.digest
    changes: list[dict[str, Any]] = [
        {"user": "{{ input }}"},
        {"system": "You."},
        {"assistant": ""},
        {"examples": []},
        {"sampling": {"temperature": 0.4}},
        {"adapter": "support@2"},
        {"description": ""},
        {"variables": {**plain["variables"], "more": "string"}},
    ]
    digests = {parse_template({**plain, **change}).digest for change in changes}
    assert len(digests | {template.digest}) == len(changes) + 1


def test_values_are_checked_and_defaults_filled_in() -> None:
    _, template = parse_file(FILE, "f")
    found = checked_values(template.variables, {"product": "X", "score": 1, "facts": ["a"]})
    assert found == {"product": "X", "tone": "calm", "score": 1, "short": False, "facts": ["a"]}


@pytest.mark.parametrize(
    ("values", "where", "says"),
    [
        ({}, "variables.product", "required"),
        ({"product": "X", "colour": "red"}, "variables.colour", "no such variable"),
        ({"product": 3}, "variables.product", "a text"),
        ({"product": None}, "variables.product", "a text"),
        ({"product": "123456789"}, "variables.product", "9 characters; at most 8"),
        ({"product": "X", "tone": "loud"}, "variables.tone", "calm, brisk"),
        ({"product": "X", "year": 1999}, "variables.year", "from 2000 to 2100"),
        ({"product": "X", "year": 10**400}, "variables.year", "from 2000 to 2100"),
        ({"product": "X", "year": 2000.0}, "variables.year", "whole number"),
        ({"product": "X", "year": True}, "variables.year", "whole number"),
        ({"product": "X", "score": "1"}, "variables.score", "a number"),
        ({"product": "X", "score": float("nan")}, "variables.score", "from"),
        ({"product": "X", "short": 1}, "variables.short", "true or false"),
        ({"product": "X", "facts": "a"}, "variables.facts", "list"),
        ({"product": "X", "facts": ["a"] * 3}, "variables.facts", "3 items"),
        ({"product": "X", "facts": ["a", "123456"]}, "variables.facts", "item 1 has 6"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], where: str, says: str) -> None:
    _, template = parse_file(FILE, "f")
    with pytest.raises(InvalidVariables) as caught:
        checked_values(template.variables, values)
    assert caught.value.where == where
    assert says in caught.value.reason


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"user": None}, "user"),
        ({"user": " "}, "user"),
        ({"user": 3}, "user"),
        ({"user": "x" * (MAX_PART + 1)}, "user"),
        ({"source": "x"}, "source"),
        ({"system": ["x"]}, "system"),
        ({"examples": [{"user": "x"}]}, "examples.0"),
        ({"variables": ["x"]}, "variables"),
        ({"variables": {"Input": "string"}}, "variables"),
        ({"variables": {"input": "string"}}, "variables"),
        ({"variables": {"x": "text"}}, "variables.x.type"),
        ({"variables": {"x": {"type": "string", "values": ["a"]}}}, "variables.x.values"),
        ({"variables": {"x": {"type": "enum"}}}, "variables.x.values"),
        ({"variables": {"x": {"type": "string", "max_length": 0}}}, "variables.x.max_length"),
        ({"variables": {"x": {"type": "integer", "default": "1"}}}, "variables.x.default"),
        ({"variables": {"x": {"default": "a", "required": True}}}, "variables.x.default"),
        (
            {"variables": {"x": {"type": "number", "minimum": 2, "maximum": 1}}},
            "variables.x.minimum",
        ),
        ({"variables": {"x": {"type": "number", "minimum": float("nan")}}}, "variables.x.minimum"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature"),
        ({"sampling": {"seed": 1}}, "sampling.seed"),
        ({"sampling": {"stop": "x"}}, "sampling.stop"),
        ({"sampling": {"max_new_tokens": 1.5}}, "sampling.max_new_tokens"),
        ({"adapter": "support:x"}, "adapter"),
    ],
)
def test_a_wrong_definition_is_refused_by_its_field(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidTemplate) as caught:
        parse_template({"user": "{{ input }}", **change})
    assert caught.value.where == where


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"user: [", b"\xff\xfe\x00", b"user: !!python/object:os.system x", b"a: &a x\nb: *a"],
)
def test_a_wrong_file_is_named(content: bytes) -> None:
    with pytest.raises(InvalidTemplate, match=r"bad\.yaml") as caught:
        parse_file(content, "bad.yaml")
    assert caught.value.where == "bad.yaml"
