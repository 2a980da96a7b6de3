"""Prompt lookup: the same bits as without it, and rows only where they pay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from base import kernels
from base.load import load_base
from service.engine.config import EngineConfig, KVDtype
from service.engine.loop import Engine
from service.engine.request import Request, Sampling
from service.engine.speculation import (
    LONGEST,
    Drafter,
    Pace,
    continued,
    lengths,
    longest_match,
)
from service.grammars import Grammar, Grammars
from tests.oracle import make_adapter, make_base
from tests.waiting import PATIENCE
from tests.zoo import Zoo, collect, greedy, held, specimen, start

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "alora": {},
    "prefix_tuning": {"rank": 21},
}
CALL = [7, 9]  # invokes the aLoRA
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


class Eager(Pace):
    """Every guess is worth its row, so that many are wrong."""

    @property
    def fixed(self) -> float:
        return 1e12


@given(TOKENS)
def test_the_longest_match(tokens: list[int]) -> None:
    best, source = 0, 0
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, LONGEST) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length and length >= best:
            best, source = length, end
    assert longest_match(np.array(tokens, dtype=np.int32)) == (best, source)


@given(TOKENS, st.integers(0, 90))
def test_a_draft_goes_on_where_the_match_did(tokens: list[int], count: int) -> None:
    array = np.array(tokens, dtype=np.int32)
    match, source = longest_match(array)
    if not match:
        return
    draft = continued(array, source, count)
    whole = tokens + list(draft)
    assert len(draft) == count
    assert all(whole[len(tokens) + i] == whole[source + i] for i in range(count))


@given(TOKENS, st.lists(TOKENS, max_size=12), st.integers(1, 9))
def test_a_drafter_stays_within_its_bounds(
    prompt: list[int], steps: list[list[int]], most: int
) -> None:
    limit = len(prompt) + 40
    drafter, tokens = Drafter(most, limit), list(prompt)
    for new in steps:
        draft = drafter.draft(tokens)
        assert len(draft) <= most
        assert len(tokens) + len(draft) < max(limit, len(tokens) + 1)
        chances = drafter.chances()
        assert len(chances) == len(draft)
        assert chances == sorted(chances, reverse=True)
        assert all(0 < chance <= 1 for chance in chances)
        tokens += new
        if len(tokens) >= limit:
            return


def test_a_drafter_learns_whether_it_is_right_with_and_without_rows() -> None:
    copying, drifting = Drafter(4, 4000), Drafter(4, 4000)
    rng = random.Random(0)
    page = [rng.randrange(50) for _ in range(300)]
    same, other = page * 2, page + [rng.randrange(50) for _ in range(300)]
    for length in range(310, 600):
        copying.draft(same[:length])
        drifting.draft(other[:length])
    assert copying.chances()[0] > 0.95
    assert drifting.chances()[0] < 0.1
    back = other + page
    for length in range(601, 660):
        drifting.draft(back[:length])
    assert drifting.chances()[0] > 0.5, "it finds out by itself that guessing pays again"


def test_a_rows_cost_is_learnt_from_the_steps() -> None:
    pace = Pace()
    assert pace.fixed == Pace.PRIOR
    rng = random.Random(0)
    for _ in range(300):
        rows = rng.randint(1, 9)
        pace.note(rows, 0.002 * (40 + rows))
    assert pace.fixed == pytest.approx(40, rel=0.2)
    pace.note(1, 3.0)  # somebody else had the processor
    assert pace.fixed == pytest.approx(40, rel=0.2)
    steady = Pace()
    for _ in range(300):
        steady.note(4, 0.01)
    assert steady.fixed == pytest.approx(Pace.PRIOR, rel=0.01), "one width of step tells nothing"


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), max_size=6), max_size=5),
    st.floats(1.0, 100.0),
    st.integers(0, 20),
)
def test_the_rows_of_a_step_compete(chances: list[list[float]], fixed: float, budget: int) -> None:
    own = [sorted(each, reverse=True) for each in chances]
    sampling = max(len(own), 1)
    found = lengths(own, sampling, fixed, budget)
    assert sum(found) <= budget

    def rate(taken: list[int]) -> float:
        tokens = sampling + sum(sum(each[:n]) for each, n in zip(own, taken, strict=True))
        return tokens / (fixed + sampling + sum(taken))

    for i, n in enumerate(found):
        if n:
            assert rate(found) >= rate([*found[:i], n - 1, *found[i + 1 :]]) - 1e-9
        if n < len(own[i]) and sum(found) < budget:
            assert rate(found) >= rate([*found[:i], n + 1, *found[i + 1 :]]) - 1e-9


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("speculation") / "base", "qwen3")


@pytest.fixture(scope="module")
def zoo(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    home = tmp_path_factory.mktemp("adapters")
    base = load_base(source, device="cpu", dtype="float32")
    zoo = Zoo(source, base)
    for seed, (kind, options) in enumerate(KINDS.items()):
        where = make_adapter(home / kind, source, kind, seed=seed, **options)
        zoo.specimens.append(specimen(where, base))
    return zoo


def eager(zoo: Zoo, **limits: Any) -> Engine:
    """An engine of its own that drafts whatever it can."""
    base = load_base(zoo.source, device="cpu", dtype="float32")
    engine = start(base, Zoo(zoo.source, base, zoo.specimens), **limits)
    engine._scheduler.pace = Eager()
    return engine


@pytest.fixture
def engine(zoo: Zoo) -> Iterator[Engine]:
    engine = eager(zoo)
    yield engine
    engine.check_integrity()
    engine.stop()


def repeating(rng: random.Random, pieces: list[list[int]]) -> list[int]:
    """A prompt of a few pieces in any order, so that endings were there before."""
    return [token for _ in range(rng.randint(1, 6)) for token in rng.choice(pieces)]


def mixed(zoo: Zoo, count: int) -> list[Request]:
    """Requests of all that the engine serves, over prompts that repeat themselves."""
    rng = random.Random(11)
    pieces = [[rng.randrange(3, 500) for _ in range(rng.randint(1, 14))] for _ in range(4)]
    pieces.append(CALL)
    base = zoo.base
    grammars = Grammars(base.tokenizer, base.spec.vocab_size, base.eos_token_ids)
    guide = asyncio.run(grammars.guide(Grammar("regex", "(ab|ba|abba )+", "f")))
    options: list[dict[str, Any]] = [
        {},
        {},
        {"top_logprobs": 2},
        {"repetition_penalty": 1.1, "presence_penalty": 0.2},
        {"do_sample": True, "temperature": 0.3, "seed": 5},
        {"do_sample": True, "temperature": 1.0, "top_p": 0.5, "seed": 6},
        {"logit_bias": ((17, 3.0),), "min_new_tokens": 5},
        {"stop": ("a", "e"), "ignore_eos": False},
        {"guide": guide, "ignore_eos": False},
    ]
    found = []
    for number in range(count):
        chosen = rng.choice([None, *zoo.specimens])
        sampling = Sampling(
            **{"ignore_eos": True, "max_new_tokens": rng.randint(1, 24)} | rng.choice(options)
        )
        request = Request(
            str(number),
            tuple(repeating(rng, pieces)),
            sampling,
            chosen.ref() if chosen else None,
            n=rng.choice([1, 1, 1, 2]),
            prompt_logprobs=rng.random() < 0.1,
        )
        found.append(request)
    return found


def told(engine: Engine, requests: list[Request]) -> list[Any]:
    """All that each of them says, however it was computed."""
    answers = []
    with held(engine):  # so that they run together
        streams = [engine.submit(request) for request in requests]
    for stream in streams:
        tokens, ends = collect(stream)
        assert all(end.error is None for end in ends)
        said = [
            [(t.id, t.text, t.logprob, t.top) for t in tokens if t.index == end.index]
            for end in sorted(ends, key=lambda end: end.index)
        ]
        closed = [
            (e.index, e.reason, e.text, e.generated_tokens, e.prompt_logprobs, e.prompt_top)
            for e in sorted(ends, key=lambda end: end.index)
        ]
        answers.append((said, closed))
    engine.check_integrity()
    return answers


@pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")
@pytest.mark.parametrize(
    ("count", "kv_dtype"),
    [
        (60, "auto"),
        pytest.param(200, "auto", marks=pytest.mark.slow),
        pytest.param(200, "int8", marks=pytest.mark.slow),
    ],
)
def test_mixed_requests_say_the_same_to_the_bit(zoo: Zoo, count: int, kv_dtype: KVDtype) -> None:
    """Of every kind, in steps of other widths, with too few blocks, so that some start again."""
    requests = mixed(zoo, count)
    token = EngineConfig(kv_dtype=kv_dtype).token_bytes(zoo.base)
    limits = {"block_size": 4, "kv_cache_bytes": 128 * token, "kv_dtype": kv_dtype}
    plain = eager(zoo, **limits)
    want = told(plain, requests)
    plain.stop()
    engine = eager(zoo, **limits)
    counted = {"draft_tokens": 0, "accepted_tokens": 0, "preempted": 0}

    def add(report: Any) -> None:
        for name in counted:
            counted[name] += getattr(report, name)

    engine._observer.stepped = add  # type: ignore[method-assign]
    lookup = [
        replace(request, prompt_lookup_num_tokens=1 + number % 9)
        for number, request in enumerate(requests)
    ]
    for one, other, request in zip(told(engine, lookup), want, lookup, strict=True):
        assert one == other, request
    engine.stop()
    assert counted["accepted_tokens"] > count
    assert counted["draft_tokens"] - counted["accepted_tokens"] > count
    assert counted["preempted"] > 0, counted


LOOP = [5, 6, 7, 8] * 6


def lookup(ident: str, prompt: list[int], new: int, most: int = 6, **sampling: Any) -> Request:
    return replace(greedy(ident, prompt, None, new, **sampling), prompt_lookup_num_tokens=most)


def forced(token: int) -> dict[str, Any]:
    """Its output is this token and nothing else."""
    return {"logit_bias": ((token, 1000.0),)}


def test_what_was_right_is_in_the_prefix_cache_and_what_was_wrong_is_not(engine: Engine) -> None:
    right = lookup("right", [9] * 8, 60, **forced(9))
    tokens, (end,) = collect(engine.submit(right))
    assert [token.id for token in tokens] == [9] * 60
    assert end.accepted_tokens > 40
    assert end.draft_tokens >= end.accepted_tokens
    whole = [9] * 8 + [token.id for token in tokens]
    _, (again,) = collect(engine.submit(greedy("again", whole, new=1)))
    assert again.cached_tokens == (len(whole) - 1) // 16 * 16
    wrong = lookup("wrong", LOOP, 30, **forced(5))  # after 5 the draft says 6
    tokens, (end,) = collect(engine.submit(wrong))
    assert [token.id for token in tokens] == [5] * 30
    assert end.draft_tokens > end.accepted_tokens
    _, (guessed,) = collect(engine.submit(greedy("guessed", LOOP + [5, 6, 7, 8] * 4, new=1)))
    assert guessed.cached_tokens == 16, "a block of the prompt, and none of the wrong drafts"


def test_the_counts_add_up(engine: Engine) -> None:
    reports: list[Any] = []
    engine._observer.stepped = reports.append  # type: ignore[method-assign]
    ends = []
    for stream in [engine.submit(lookup(str(i), LOOP, 20 + i)) for i in range(5)]:
        tokens, (end,) = collect(stream)
        assert len(tokens) == end.generated_tokens
        ends.append(end)
    engine.check_integrity()
    assert sum(r.draft_tokens for r in reports) == sum(end.draft_tokens for end in ends) > 0
    assert sum(r.accepted_tokens for r in reports) == sum(end.accepted_tokens for end in ends)
    assert sum(r.generated_tokens for r in reports) == sum(end.generated_tokens for end in ends)
    assert all(r.accepted_tokens <= r.draft_tokens for r in reports)


def test_a_token_within_a_draft_ends_the_sequence(engine: Engine) -> None:
    """By its number, by its text, and by the length: nothing comes after it."""
    again = lookup("again", [9] * 20, 60, min_new_tokens=7, **forced(9))
    ends = replace(again, sampling=replace(again.sampling, stop_token_ids=(9,)))
    plain = replace(ends, prompt_lookup_num_tokens=0)
    assert told(engine, [ends]) == told(engine, [plain])
    text = engine.base.tokenizer.decode([9] * 5)
    stops = lookup("stop", [9] * 20, 60, stop=(text,), **forced(9))
    tokens, (end,) = collect(engine.submit(stops))
    assert (len(tokens), end.reason, end.text) == (5, "stop_sequence", "")
    for new in range(1, 12):
        tokens, (end,) = collect(engine.submit(lookup("length", [9] * 20, new, **forced(9))))
        assert (len(tokens), end.reason) == (new, "length")
    assert engine._pool.used == 0


def test_a_step_that_fails_with_drafts_is_run_again_without(zoo: Zoo) -> None:
    engine = eager(zoo)
    run, failed = engine._runner.run, []

    def once(batch: Any, adapters: Any) -> Any:
        if not failed and any(chunk.draft for chunk in batch.chunks) and adapters:
            failed.append(batch)
            raise RuntimeError("boom")
        return run(batch, adapters)

    engine._runner.run = once  # type: ignore[method-assign]
    adapted = replace(
        greedy("lora", [9] * 20, zoo.named("lora").ref(), 40, **forced(9)),
        prompt_lookup_num_tokens=5,
    )
    streams = [engine.submit(adapted), engine.submit(lookup("base", [9] * 20, 40, **forced(9)))]
    for stream in streams:
        tokens, (end,) = collect(stream)
        assert end.error is None
        assert [token.id for token in tokens] == [9] * 40
    assert failed
    engine.check_integrity()
    engine.stop()


def test_cancelling_between_drafts_frees_all(engine: Engine) -> None:
    streams = [engine.submit(lookup(str(i), [9] * 30, 300, **forced(9))) for i in range(12)]
    next(iter(streams[0].iterate(PATIENCE)))
    for stream in streams:
        stream.cancel()
    for stream in streams:
        _, (end,) = collect(stream)
        assert end.reason in ("cancelled", "length")
    engine.check_integrity()
    assert engine._pool.used == 0
