"""The engine over a tiny base: what a request can rely on while others come and go."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.delta import LinearDelta, LoweredAdapter, LowRank
from adapters.errors import AdapterNotFound, InvalidAdapter
from base.load import Base, load_base
from service.engine.loop import Engine
from service.engine.request import AdapterRef, Finished, Request, Sampling, Token
from service.errors import (
    AdapterLoadFailed,
    Draining,
    EngineFailed,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
)
from tests.oracle import make_adapter, make_base
from tests.waiting import PATIENCE, until
from tests.zoo import Zoo, collect, greedy, held, slowly, specimen, start


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def source(home: Path) -> Path:
    return make_base(home / "base", "qwen3")


@pytest.fixture(scope="module")
def adapters(home: Path, source: Path) -> Zoo:
    base = load_base(source, device="cpu", dtype="float32")
    zoo = Zoo(source, base)
    for number, kind in enumerate(("lora", "dora", "rslora")):
        where = make_adapter(home / kind, source, kind, rank=4, seed=number)
        zoo.specimens.append(specimen(where, base))
    return zoo


@pytest.fixture
def zoo(source: Path, adapters: Zoo) -> Zoo:
    """The same adapters over a fresh base: an engine wraps the layers of its own."""
    return Zoo(source, load_base(source, device="cpu", dtype="float32"), list(adapters.specimens))


@pytest.fixture
def engine(zoo: Zoo) -> Iterator[Engine]:
    engine = start(zoo.base, zoo)
    yield engine
    if engine.alive:
        engine.check_integrity()
    engine.stop()


def ids(engine: Engine, request: Request) -> list[int]:
    tokens, (end,) = collect(engine.submit(request))
    assert end.error is None
    return [token.id for token in tokens]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 500) for _ in range(length)]


def long(ident: str, ref: AdapterRef | None = None, new: int = 400) -> Request:
    return greedy(ident, prompt(5), ref, new)


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(engine: Engine, zoo: Zoo) -> None:
    sampling = Sampling(True, temperature=1.2, seed=5, max_new_tokens=20, ignore_eos=True)
    request = Request("a", tuple(prompt(30)), sampling, zoo.specimens[0].ref())
    alone = ids(engine, request)
    crowd = [engine.submit(long(str(i), zoo.specimens[i % 3].ref(), 60)) for i in range(9)]
    assert ids(engine, replace(request, id="b")) == alone
    other = replace(request, id="c", sampling=replace(sampling, seed=6))
    assert ids(engine, other) != alone
    for stream in crowd:
        collect(stream)


def test_n_sequences_share_the_prompt_and_differ(engine: Engine) -> None:
    sampling = Sampling(True, temperature=1.5, seed=1, max_new_tokens=10, ignore_eos=True)
    request = Request("n", tuple(prompt(40)), sampling, n=3)
    tokens, ends = collect(engine.submit(request))
    outputs = [tuple(t.id for t in tokens if t.index == i) for i in range(3)]
    assert len(set(outputs)) == 3
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert sorted(end.cached_tokens for end in ends) == [0, 32, 32]
    single = Request("s", tuple(prompt(40)), replace(sampling, seed=2))
    assert ids(engine, single) == list(outputs[1]), "sequence i has seed + i"


def test_cached_prefixes_change_nothing_but_the_work(engine: Engine, zoo: Zoo) -> None:
    for ref in (None, zoo.specimens[1].ref()):
        first, (cold,) = collect(engine.submit(greedy("1", prompt(50), ref)))
        second, (warm,) = collect(engine.submit(greedy("2", prompt(50), ref)))
        assert cold.cached_tokens == 0, "no block of another adapter, nor of the base, is taken"
        assert warm.cached_tokens == 48
        assert [t.id for t in first] == [t.id for t in second]
        for a, b in zip(first, second, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_tenants_do_not_share_blocks(engine: Engine) -> None:
    ids(engine, replace(greedy("1", prompt(50)), tenant="one"))
    _, (end,) = collect(engine.submit(replace(greedy("2", prompt(50)), tenant="two")))
    assert end.cached_tokens == 0


def test_preempted_sequences_say_the_same(zoo: Zoo) -> None:
    token = 2 * 2 * zoo.base.spec.num_kv_heads * 32 * 4
    roomy = start(zoo.base, zoo)
    requests = [greedy(str(i), prompt(20, i), zoo.specimens[i % 3].ref(), 40) for i in range(6)]
    want = [ids(roomy, request) for request in requests]
    roomy.stop()
    base = load_base(zoo.source, device="cpu", dtype="float32")
    preempted: list[int] = []
    tight = start(base, Zoo(zoo.source, base, zoo.specimens), kv_cache_bytes=token * 16 * 9)
    tight._observer.stepped = lambda report: preempted.append(report.preempted)  # type: ignore
    with held(tight):
        streams = [tight.submit(request) for request in requests]
    assert [[t.id for t in collect(s)[0]] for s in streams] == want
    tight.check_integrity()
    assert sum(preempted) > 0, "the cache was meant to be too small"
    tight.stop()


def test_stop_strings_end_the_text_and_are_not_in_it(engine: Engine) -> None:
    tokens, (end,) = collect(engine.submit(greedy("1", prompt(9), new=30)))
    text = end.text
    assert "".join(t.text for t in tokens) == text
    stop = text[8:11]
    tokens, (end,) = collect(engine.submit(greedy("2", prompt(9), new=30, stop=(stop,))))
    assert end.reason == "stop_sequence"
    assert end.text == text[: text.index(stop)]
    assert "".join(t.text for t in tokens) == end.text


def test_the_end_token_ends_unless_it_is_ignored(engine: Engine) -> None:
    (first, *_), _ = collect(engine.submit(greedy("1", prompt(9))))
    stopping = Sampling(max_new_tokens=9, stop_token_ids=(first.id,))
    tokens, (end,) = collect(engine.submit(Request("2", tuple(prompt(9)), stopping)))
    assert (end.reason, len(tokens)) == ("eos_token", 1)
    later = replace(stopping, min_new_tokens=4, ignore_eos=True)
    tokens, _ = collect(engine.submit(Request("3", tuple(prompt(9)), later)))
    assert len(tokens) >= 4
    assert first.id not in [t.id for t in tokens[:4]]


def test_prompt_logprobs_are_those_of_the_model(engine: Engine, zoo: Zoo) -> None:
    tokens = prompt(90)
    ids(engine, greedy("warm", tokens))  # a cached prefix must not hide them
    request = replace(greedy("1", tokens, new=1), prompt_logprobs=True)
    _, (end,) = collect(engine.submit(request))
    want = zoo.oracle(None).logits(tokens).log_softmax(-1)[:-1]
    expected = want.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(end.prompt_logprobs), expected, atol=1e-4, rtol=0)


def test_cancelling_frees_all_within_a_step(engine: Engine) -> None:
    with slowly(engine):
        streams = [engine.submit(long(str(i))) for i in range(70)]
        next(iter(streams[0].iterate(PATIENCE)))
        for stream in streams:
            stream.cancel()
            stream.cancel()
    for stream in streams:
        _, (end,) = collect(stream)
        assert end.reason == "cancelled"
    assert engine._pool.used == 0
    engine.check_integrity()


def test_a_full_queue_refuses_and_serves_on(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo, max_waiting=4, max_sequences=1)
    refused = []
    with held(engine):
        streams = [engine.submit(long(str(i), new=30)) for i in range(2)]
        for i in range(10):
            try:
                streams.append(engine.submit(long(f"x{i}", new=30)))
            except Overloaded as error:
                refused.append(error.retry_after)
    assert len(streams) == 4
    assert min(refused) > 0
    assert all(collect(stream)[1][0].reason == "length" for stream in streams)
    assert ids(engine, greedy("later", prompt(4)))
    engine.stop()


def test_a_queue_of_long_prompts_refuses_before_it_is_full(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo, max_waiting_tokens=100, max_sequences=1)
    for _ in range(2):  # what has left, cancelled or served, counts no more
        refused = 0
        with held(engine):
            streams = [engine.submit(greedy(str(i), prompt(30), new=20)) for i in range(3)]
            for i in range(10):
                try:
                    streams.append(engine.submit(greedy(f"x{i}", prompt(30), new=20)))
                except Overloaded as error:
                    refused += "tokens wait already" in str(error)
        assert refused == 10
        streams[-1].cancel()
        for stream in streams:
            collect(stream)
    engine.stop()


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([], "no tokens"), ([1] * 4096, "has room for|have room for"), ([10**6], "vocabulary")],
)
def test_a_prompt_that_cannot_be_served_is_refused(
    engine: Engine, tokens: list[int], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        engine.submit(greedy("1", tokens))


def test_an_output_ends_where_the_positions_end(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo, max_model_len=32)
    tokens, (end,) = collect(engine.submit(greedy("1", prompt(25), new=100)))
    assert (len(tokens), end.reason) == (7, "length")
    engine.stop()


def test_draining_finishes_what_runs_and_admits_nothing(engine: Engine) -> None:
    stream = engine.submit(long("1", new=50))
    drained = threading.Thread(target=engine.drain)
    drained.start()
    until(lambda: engine._door.draining)
    with pytest.raises(Draining):
        engine.submit(long("2"))
    assert collect(stream)[1][0].reason == "length"
    drained.join(PATIENCE)
    assert not drained.is_alive()


def test_stopping_ends_every_stream(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo)
    with slowly(engine):
        streams = [engine.submit(long(str(i))) for i in range(3)]
        engine.stop()
    assert [collect(s)[1][0].reason for s in streams] == ["cancelled"] * 3
    with pytest.raises(EngineFailed):
        engine.submit(long("late"))


def test_streams_are_read_by_an_event_loop(engine: Engine) -> None:
    async def read(number: int) -> list[int]:
        stream = engine.submit(greedy(str(number), prompt(6, number)))
        return [event.id async for event in stream if isinstance(event, Token)]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*(read(i) for i in range(8)))

    assert asyncio.run(read_all()) == [
        ids(engine, greedy(f"again-{i}", prompt(6, i))) for i in range(8)
    ]


# Adapters that come, go, and fail while others run.


def test_loading_beside_running_streams_changes_no_token(engine: Engine, zoo: Zoo) -> None:
    requests = [greedy(str(i), prompt(12, i), None, 60) for i in range(16)]
    want = [ids(engine, request) for request in requests]
    streams = [engine.submit(replace(r, id=f"{r.id}-again")) for r in requests]
    for found in zoo.specimens:
        report = engine.load(found.ref())
        assert report.nbytes > 0
        ids(engine, greedy("with", prompt(5), found.ref()))
    assert [[t.id for t in collect(s)[0]] for s in streams] == want


def test_slots_are_given_away_only_when_nobody_runs(zoo: Zoo) -> None:
    size = max(zoo.fetch(s.ref()).nbytes for s in zoo.specimens)
    engine = start(zoo.base, zoo, slot_bytes=int(size * 1.5))
    want = {s.manifest.name: ids(engine, greedy("w", prompt(9), s.ref())) for s in zoo.specimens}
    streams = [
        (s.manifest.name, engine.submit(greedy(str(i), prompt(9), s.ref())))
        for i, s in enumerate(zoo.specimens * 5)
    ]
    for name, stream in streams:
        assert [t.id for t in collect(stream)[0]] == want[name]
    engine.check_integrity()
    assert sum(r.tier == "slot" for r in engine.residents()) == 1
    engine.stop()


def test_a_pinned_adapter_keeps_its_slot(zoo: Zoo) -> None:
    size = max(zoo.fetch(s.ref()).nbytes for s in zoo.specimens)
    engine = start(zoo.base, zoo, slot_bytes=int(size * 1.5))
    first, second = zoo.specimens[0].ref(), zoo.specimens[1].ref()
    engine.pin(first)
    with pytest.raises(AdapterLoadFailed, match="unpin"):
        engine.load(second, timeout=0.3)
    engine.unpin(first)
    assert engine.load(second).digest == second.digest
    engine.stop()


def test_forgetting_waits_for_what_runs_and_drops_its_blocks(engine: Engine, zoo: Zoo) -> None:
    ref = zoo.specimens[0].ref()
    ids(engine, greedy("warm", prompt(40), ref))
    gone = threading.Thread(target=engine.forget, args=(ref.digest,))
    with slowly(engine):
        stream = engine.submit(greedy("running", prompt(40), ref, 150))
        next(iter(stream.iterate(PATIENCE)))
        gone.start()
        until(lambda: ref.digest in engine._door.forgotten)
        with pytest.raises(AdapterNotFound):
            engine.submit(greedy("late", prompt(4), ref))
    _, (end,) = collect(stream)
    assert end.reason == "length", "what ran was let run"
    gone.join(PATIENCE)
    assert not gone.is_alive()
    assert [r for r in engine.residents() if r.digest == ref.digest] == []
    _, (cold,) = collect(engine.submit(greedy("back", prompt(40), ref)))
    assert cold.cached_tokens == 0, "its old blocks are gone"


def test_a_failed_load_ends_its_requests_alone(engine: Engine, zoo: Zoo) -> None:
    missing = AdapterRef("0" * 64, "missing")
    zoo.specimens.append(replace_name(zoo, "missing"))
    beside = engine.submit(greedy("beside", prompt(5), None, 60))
    _, (end,) = collect(engine.submit(greedy("lost", prompt(5), missing)))
    assert end.reason == "error"
    assert isinstance(end.error, AdapterLoadFailed)
    assert "missing" in str(end.error)
    with pytest.raises(AdapterLoadFailed, match="missing"):
        engine.load(missing)
    assert collect(beside)[1][0].reason == "length"


def replace_name(zoo: Zoo, name: str) -> Any:
    found = zoo.specimens[0]
    return type(found)(found.directory, replace(found.manifest, name=name))


def broken(base: Base, value: float, rows: int) -> LoweredAdapter:
    """A LoRA of constant `value` on one layer, with `rows` output rows."""
    path = "model.layers.0.self_attn.q_proj"
    width = base.spec.linears[path].in_features
    delta = LinearDelta((LowRank(torch.full((2, width), value), torch.full((rows, 2), value)),))
    return LoweredAdapter("f" * 64, "lora", "unmerged", {path: delta})


@pytest.mark.parametrize(("value", "extra"), [(float("nan"), 0), (1.0, 3)])
def test_a_bad_adapter_ends_its_own_requests_only(zoo: Zoo, value: float, extra: int) -> None:
    rows = zoo.base.spec.linears["model.layers.0.self_attn.q_proj"].out_features
    bad = broken(zoo.base, value, rows + extra)
    good = zoo.specimens[0].ref()
    engine = start(zoo.base, fetch=lambda ref: bad if ref.name == "bad" else zoo.fetch(ref))
    want = ids(engine, greedy("want", prompt(20), good, 30))
    beside = [engine.submit(greedy(str(i), prompt(20), good, 30)) for i in range(3)]
    _, (end,) = collect(engine.submit(greedy("bad", prompt(5), AdapterRef(bad.digest, "bad"))))
    assert end.reason == "error"
    assert isinstance(end.error, GenerationFailed)
    assert "adapter" in str(end.error)
    assert [[t.id for t in collect(s)[0]] for s in beside] == [want] * 3
    assert engine.alive
    engine.check_integrity()
    engine.stop()


@pytest.mark.parametrize(("value", "extra"), [(float("nan"), 0), (1.0, 3)])
def test_a_trial_run_finds_a_bad_adapter_before_it_serves(
    engine: Engine, zoo: Zoo, value: float, extra: int
) -> None:
    rows = zoo.base.spec.linears["model.layers.0.self_attn.q_proj"].out_features
    beside = engine.submit(greedy("beside", prompt(5), zoo.specimens[0].ref(), 40))
    with pytest.raises(InvalidAdapter, match="trial run"):
        engine.probe(broken(zoo.base, value, rows + extra))
    engine.probe(zoo.fetch(zoo.specimens[1].ref()))
    assert collect(beside)[1][0].reason == "length"
    engine.check_integrity()


def test_a_fault_of_the_engine_ends_every_request_with_its_reason(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo)
    ids(engine, greedy("fine", prompt(4)))

    def explode(*_: Any) -> torch.Tensor:
        raise RuntimeError("no memory left")

    engine._runner.run = explode  # type: ignore[method-assign]
    _, (end,) = collect(engine.submit(greedy("1", prompt(4))))
    assert isinstance(end, Finished)
    assert end.reason == "error"
    assert isinstance(end.error, EngineFailed)
    assert "no memory left" in str(end.error)
    engine._thread.join(PATIENCE)
    assert not engine.alive
    with pytest.raises(EngineFailed, match="no memory left"):
        engine.submit(greedy("2", prompt(4)))
