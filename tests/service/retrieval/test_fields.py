"""Metadata is typed, and a filter becomes an expression without one character of a client's."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.retrieval.fields import (
    Condition,
    Group,
    check_fields,
    check_metadata,
    expression,
    parse_filter,
)
from service.retrieval.passage import key_of

FIELDS = check_fields(
    {"year": "integer", "language": "string", "when": "date", "open": "boolean", "size": "number"}
)


def test_fields_are_declared_with_plain_names_and_known_types() -> None:
    for bad in ({"Year": "integer"}, {"a b": "string"}, {"not": "string"}, {"x": "text"}):
        with pytest.raises(InvalidRequest) as refused:
            check_fields(bad)
        assert refused.value.field == f"fields.{next(iter(bad))}"
    with pytest.raises(InvalidRequest, match="at most 32"):
        check_fields({f"f{i}": "string" for i in range(33)})


def test_values_have_their_field_s_type() -> None:
    given = {"year": 2020, "when": "2020-02-29", "open": True, "size": 3, "language": None}
    found = check_metadata(given, FIELDS)
    assert found == {"year": 2020, "when": date(2020, 2, 29), "open": True, "size": 3.0}
    assert isinstance(found["size"], float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("year", "2020"),
        ("year", True),
        ("year", 1 << 63),
        ("when", "29.2.2020"),
        ("when", "2021-02-29"),
        ("open", 1),
        ("size", float("nan")),
        ("language", "x" * 2000),
        ("language", "a\0b"),
        ("country", "x"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_metadata({name: value}, FIELDS)
    assert refused.value.field == f"metadata.{name}"
    with pytest.raises(InvalidRequest):
        parse_filter({name: value}, FIELDS)


def test_a_filter_is_read_into_typed_conditions() -> None:
    found = parse_filter(
        {"year": {"gte": 2020, "lt": 2024}, "any": [{"language": "en"}, {"not": {"open": True}}]},
        FIELDS,
    )
    assert found == Group(
        "all",
        (
            Condition("f_year", "gte", (2020,)),
            Condition("f_year", "lt", (2024,)),
            Group(
                "any",
                (
                    Group("all", (Condition("f_language", "eq", ("en",)),)),
                    Group(
                        "all",
                        (Group("not", (Group("all", (Condition("f_open", "eq", (True,)),)),)),),
                    ),
                ),
            ),
        ),
    )
    assert parse_filter({}, FIELDS) is None


def test_documents_are_filtered_by_key_whatever_they_are_called() -> None:
    name = "x' OR '1'='1"
    found = parse_filter({"document": {"in": [name]}}, FIELDS)
    assert found == Group("all", (Condition("key", "in", (key_of(name),)),))
    sql = expression(found).to_sql()
    assert name not in sql
    assert key_of(name) in sql


def test_a_value_stays_a_literal() -> None:
    hostile = "en' OR 1=1 --"
    found = parse_filter({"language": hostile}, FIELDS)
    assert found is not None
    assert expression(found).to_sql() == "(f_language = 'en'' OR 1=1 --')"


@pytest.mark.parametrize(
    "given",
    [
        "year > 2020",
        ["year"],
        {"year > 2020 OR 1": 1},
        {"year": {"like": 1}},
        {"year": {"in": 2020}},
        {"year": {"in": []}},
        {"year": {"in": list(range(300))}},
        {"year": {}},
        {"all": []},
        {"all": {"year": 1}},
        {"not": []},
        {"document": {"gt": "a"}},
        {"any": [{"year": i} for i in range(65)]},
        {"all": [{"all": [{"year": i} for i in range(40)]}] * 2},
    ],
)
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_filter(given, FIELDS)
    assert refused.value.field is not None
    assert refused.value.field.startswith("filter")


def test_depth_is_bounded() -> None:
    given: Any = {"year": 1}
    for _ in range(12):
        given = {"not": given}
    with pytest.raises(InvalidRequest, match="deeper"):
        parse_filter(given, FIELDS)
