"""Guided rows in a mixed batch; the states that embeddings are made of."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.load import Base, load_base
from service.engine.loop import Engine
from service.engine.request import Request, Sampling
from service.grammars import Grammar, Grammars
from tests.oracle import PeftOracle, make_base, random_tokens
from tests.zoo import Recorder, collect, greedy, start


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("guide") / "base", "qwen3")


@pytest.fixture
def base(source: Path) -> Base:
    return load_base(source, device="cpu", dtype="float32")


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    engine = start(base)
    yield engine
    engine.check_integrity()
    engine.stop()


def guided(base: Base, grammar: Grammar, **sampling: object) -> Request:
    grammars = Grammars(base.tokenizer, base.spec.vocab_size, base.eos_token_ids)
    guide = asyncio.run(grammars.guide(grammar))
    options = Sampling(max_new_tokens=40, guide=guide, **sampling)  # type: ignore[arg-type]
    return Request("guided", tuple(random_tokens(9)), options)


def test_a_guided_row_follows_and_others_keep_their_bits(engine: Engine, base: Base) -> None:
    recorder = Recorder(engine)
    asked = [greedy(str(i), random_tokens(5 + i, seed=i)) for i in range(3)]
    alone = [collect(engine.submit(request))[0] for request in asked]
    before = {request.id: recorder.rows(request.id) for request in asked}
    regex = r"[a-f]{3}-[0-9]{2}"
    guides = [
        guided(base, Grammar("regex", regex, "f")),
        guided(base, Grammar("regex", regex, "f"), do_sample=True, temperature=2.0, seed=3),
        replace(guided(base, Grammar("regex", regex, "f"), min_new_tokens=30), n=3),
    ]
    streams = [engine.submit(request) for request in [*asked, *guides]]
    for want, stream in zip(alone, streams[:3], strict=True):
        assert collect(stream)[0] == want
    for stream in streams[3:]:
        for end in collect(stream)[1]:
            assert end.reason == "eos_token"
            assert re.fullmatch(regex, end.text), end.text
    for name, rows in before.items():
        now = recorder.rows(name)
        assert rows
        assert all(torch.equal(now[position], row) for position, row in rows.items())


def test_json_by_a_schema(engine: Engine, base: Base) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    _, (end,) = collect(engine.submit(guided(base, Grammar.schema(schema, "f"))))
    found = json.loads(end.text)
    assert set(found) == {"ok", "n"}
    assert found["n"] in (1, 2, 3)


def test_a_grammar_beyond_its_bounds_ends_its_own_request(engine: Engine, base: Base) -> None:
    bad = Grammar("lark", "start: " + " ".join(['"a"?'] * 2500), "f")
    (letter,) = base.tokenizer.encode("a", add_special_tokens=False)
    stream = engine.submit(guided(base, bad, logit_bias=((letter, 1000.0),)))
    other = engine.submit(greedy("other", random_tokens(4)))
    _, (end,) = collect(stream)
    assert end.reason == "error"
    assert "grammar" in str(end.error)
    assert collect(other)[1][0].reason == "length"


def test_a_bias_bans_and_forces(engine: Engine) -> None:
    prompt = random_tokens(6)
    first = collect(engine.submit(greedy("a", prompt, new=1)))[0][0].id
    banned = greedy("b", prompt, new=4, logit_bias=((first, -1000.0),))
    assert first not in [token.id for token in collect(engine.submit(banned))[0]]
    forced = greedy("c", prompt, new=4, logit_bias=((7, 1000.0),))
    assert [token.id for token in collect(engine.submit(forced))[0]] == [7] * 4


def test_hidden_is_what_the_head_reads(engine: Engine, base: Base) -> None:
    """The state, through the head, gives the row of logits; whatever else is in the batch."""
    recorder = Recorder(engine)
    asked = [
        replace(greedy(str(i), random_tokens(4 + 30 * i, seed=i), new=1), pooled=True)
        for i in range(3)
    ]
    streams = [engine.submit(request) for request in asked]
    streams.append(engine.submit(greedy("other", random_tokens(50))))
    for request, stream in zip(asked, streams, strict=False):
        (end,) = collect(stream)[1]
        row = recorder.rows(request.id)[len(request.prompt) - 1]
        (head,) = base.model.get_output_embeddings().state_dict().values()
        torch.testing.assert_close(head.float() @ torch.tensor(end.hidden), row)


def test_alternatives_of_the_prompt(engine: Engine, base: Base) -> None:
    prompt = random_tokens(12)
    request = replace(greedy("p", prompt, new=1, top_logprobs=2), prompt_logprobs=True)
    (end,) = collect(engine.submit(request))[1]
    rows = PeftOracle(base, None).logits(prompt).log_softmax(-1)
    assert len(end.prompt_top) == len(end.prompt_logprobs) == 11
    for row, top in zip(rows, end.prompt_top, strict=False):
        assert [token for token, _ in top] == row.topk(2).indices.tolist()
        assert [p for _, p in top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
