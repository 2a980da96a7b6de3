"""Grammars: what they allow, what is refused and why, and that hostile ones cost little."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from base.mini import MINI
from service.engine.guide import Guide
from service.errors import InvalidRequest
from service.grammars import MAX_SOURCE, Grammar, Grammars

VOCABULARY = 3584


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(MINI))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, [0, 2])


def compiled(grammars: Grammars, grammar: Grammar) -> Guide:
    return asyncio.run(grammars.guide(grammar))


def follows(guide: Guide, tokenizer: Any, text: str) -> bool:
    """Whether the text is allowed, token for token, and its end too."""
    walk = guide.start()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not walk.allowed(VOCABULARY)[token]:
            return False
        assert walk.advance(token)
    return walk.complete or bool(walk.allowed(VOCABULARY)[2])


CASES = [
    (Grammar("regex", "[a-c]+ (yes|no)", "f"), "abba yes", "abba maybe"),
    (Grammar.choice(["one (1)", "two\n"], "f"), "one (1)", "one"),
    (
        Grammar.schema({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "f"),
        '{"a": 12}',
        '{"a": "b"}',
    ),
    (Grammar("lark", 'start: "a" start "b" | "c"', "f"), "aacbb", "aacb"),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), CASES, ids=[c[0].kind for c in CASES])
def test_what_follows_a_grammar(
    grammars: Grammars, tokenizer: Any, grammar: Grammar, good: str, bad: str
) -> None:
    guide = compiled(grammars, grammar)
    assert follows(guide, tokenizer, good)
    assert not follows(guide, tokenizer, bad)
    assert follows(guide, tokenizer, good), "a walk must not move the guide that it came from"
    assert compiled(grammars, grammar) is guide


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "[a-z", "regex"), "unclosed character class"),
        (Grammar("regex", "(?=a)b", "regex"), "look-around"),
        (Grammar.schema("{", "schema"), "EOF while parsing"),
        (Grammar.schema({"not": {"type": "string"}}, "schema"), "Unimplemented keys"),
        (Grammar.schema({"$ref": "http://127.0.0.1:9/x"}, "schema"), "does not fetch"),
        (
            Grammar.schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "s"),
            "refused",
        ),
        (Grammar("lark", "begin: x", "grammar"), "refused"),
        (Grammar("regex", "a" * (MAX_SOURCE + 1), "regex"), "at most 32768"),
    ],
)
def test_refusals_name_the_field_and_the_reason(
    grammars: Grammars, grammar: Grammar, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        compiled(grammars, grammar)
    assert refused.value.field == grammar.field


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = [
    Grammar("regex", "((a{1,100}){1,100}){1,100}b", "f"),
    Grammar("regex", "(a|b)*a(a|b){40}c", "f"),
    Grammar("regex", "|".join(f".*{i}.*" for i in range(2000)), "f"),
    Grammar("regex", "(" * 10_000 + "a" + ")" * 10_000, "f"),
    Grammar("lark", "start: " + " ".join(['"a"?'] * 3000), "f"),
    Grammar("lark", 'start: start start | "a" | ""', "f"),
    Grammar.schema({"type": "string", "minLength": 10**9}, "f"),
    Grammar.schema({"enum": ["x" * 20 + str(i) for i in range(1000)]}, "f"),
    Grammar.schema(_nested(60), "f"),
    Grammar.schema({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}, "f"),
]


@pytest.mark.parametrize("grammar", HOSTILE)
def test_hostile_grammars_are_bounded(grammars: Grammars, grammar: Grammar) -> None:
    """Compiled or refused, and each step computed or failed, within seconds at most."""
    started = time.process_time()
    try:
        walk = compiled(grammars, grammar).start()
    except InvalidRequest:
        walk = None
    for _ in range(20 if walk else 0):
        assert walk is not None
        allowed = walk.allowed(VOCABULARY).nonzero()[0]
        if not len(allowed) or walk.complete:
            break
        walk.advance(int(allowed[-1]))
    assert time.process_time() - started < 5


def test_json_text_and_object_are_one(grammars: Grammars) -> None:
    schema = {"type": "object"}
    guide = compiled(grammars, Grammar.schema(schema, "f"))
    assert compiled(grammars, Grammar.schema(json.dumps(schema), "f")) is guide
