"""Parts with values in them: what stands where, and what cannot happen."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import InvalidTemplate, InvalidVariables
from adapters.prompts.filling import MAX_FILLED, SLOT, check, fill, filled_chat
from adapters.prompts.template import parse_template

FULL = parse_template(
    {
        "variables": {
            "product": "string",
            "year": {"type": "integer", "required": False},
            "facts": {"type": "list", "default": []},
        },
        "system": "For {{ product }}{% if year %} of {{ year }}{% endif %}.",
        "examples": [{"user": "Is it {{ product }}?", "assistant": "Yes."}],
        "user": "{% for fact in facts %}- {{ fact }}\n{% endfor %}{{ passages }}{{ input }}",
        "assistant": "{{ product }}: ",
    }
)


def test_every_part_has_its_place() -> None:
    found = fill(FULL, {"product": "Brevo", "facts": ["one", "two"]}, "Why?")
    assert found.messages(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ) == [
        {"role": "system", "content": "For Brevo."},
        {"role": "user", "content": "Is it Brevo?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "- one\n- two\nWhy?"},
    ]
    assert found.answer == "Brevo: "
    assert not found.slotted
    assert fill(FULL, {"product": "Brevo", "year": 2001}, "Why?").system == "For Brevo of 2001."


def test_a_value_is_never_a_template() -> None:
    hostile = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# #}"
    found = fill(FULL, {"product": hostile, "facts": [hostile]}, hostile)
    assert found.answer == f"{hostile}: "
    assert found.user == f"- {hostile}\n{hostile}"


def test_passages_have_a_slot() -> None:
    found = fill(FULL, {"product": "x"}, "Why?", passages=True)
    assert found.user == f"{SLOT}Why?"
    assert found.slotted
    with pytest.raises(InvalidVariables, match="product"):
        fill(FULL, {"product": SLOT}, "Why?")
    with pytest.raises(InvalidVariables, match="input"):
        fill(FULL, {"product": "x"}, SLOT)


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("{{ nope }} {{ input }}", "takes nope, which variables do not declare"),
        ("{{ strftime_now('%Y') }}", "strftime_now"),
        ("{{ messages }}", "messages"),
        ("{% if x", "line 1"),
        ("{% include 'x' %}", "loader"),
        ("{{ ''.__class__ }}", "nothing comes of it"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}", "work"),
        ("{% for a in range(9999) %}{{ input * 100 }}{% endfor %}", f"at most {MAX_FILLED}"),
        ("{{ 'x'.zfill(1000000000) }}", "unsafe"),
        ("{{ [input, input] }}", "list"),
    ],
)
def test_a_template_is_tried_before_it_is_kept(user: str, says: str) -> None:
    with pytest.raises(InvalidTemplate, match=says):
        check(parse_template({"user": user}))


def test_the_trial_leaves_out_what_may_be_left_out() -> None:
    check(FULL)
    wrong = {"variables": {"x": {"required": False}}, "user": "{{ x }}"}
    with pytest.raises(InvalidTemplate, match="user: nothing comes of it"):
        check(parse_template(wrong))


def chat(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


def test_a_chat_is_asked_through_a_template() -> None:
    asks = parse_template({"user": "Q: {{ input }}"})
    found, history = filled_chat(asks, {}, chat("system", "user", "assistant", "user"))
    assert [m["content"] for m in found.messages(history)] == [
        "system 0",
        "user 1",
        "assistant 2",
        "Q: user 3",
    ]


@pytest.mark.parametrize(
    ("definition", "messages", "says"),
    [
        ({"user": "Q: {{ input }}"}, [], "input: is required"),
        ({"user": "Q: {{ input }}"}, chat("user", "assistant"), "last message"),
        ({"user": "Q"}, chat("user"), "does not take"),
        ({"user": "{{ input }}", "system": "S"}, chat("system", "user"), "of its own"),
    ],
)
def test_what_does_not_fit_is_said(
    definition: dict[str, Any], messages: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(InvalidVariables, match=says):
        filled_chat(parse_template(definition), {}, messages)
