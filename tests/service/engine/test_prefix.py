"""Virtual tokens in a mixed batch: token for token what PEFT gives for each adapter alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from adapters.delta import LoweredAdapter
from adapters.errors import InvalidAdapter
from base.load import load_base
from service.engine.loop import Engine
from service.engine.request import AdapterRef, Request
from service.errors import GenerationFailed, InvalidRequest
from tests.oracle import make_adapter, make_base
from tests.zoo import Recorder, Zoo, assert_equals_oracle, collect, greedy, held, specimen, start

# With blocks of 16: no whole block, one exactly, one and a piece, two and a piece.
KINDS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"rank": 5, "modules_to_save": ["lm_head", "layers.0.input_layernorm"]},
    "multitask_prompt_tuning": {"rank": 16, "num_ranks": 2},
    "p_tuning": {"rank": 20, "encoder_hidden_size": 16},
    "p_tuning_lstm": {
        "rank": 1,
        "encoder_hidden_size": 16,
        "encoder_reparameterization_type": "LSTM",
    },
    "prefix_tuning": {"rank": 37},
    "prefix_tuning_projected": {
        "rank": 16,
        "prefix_projection": True,
        "encoder_hidden_size": 16,
    },
    "cpt": {"rank": 33},
    "cartridge": {"rank": 18},
    "lora": {"rank": 4},
    "dora": {"rank": 4},
}
BASES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma": {},
    "mistral": {"sliding_window": 24},  # narrower than some of the prefixes
}
SLOW = pytest.mark.slow
Zoos = Callable[[str], Zoo]


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Zoos:
    home = tmp_path_factory.mktemp("prefixes")

    @cache
    def populate(name: str) -> tuple[Path, Zoo]:
        source = make_base(home / name / "base", name, **BASES[name])
        zoo = Zoo(source, load_base(source, device="cpu", dtype="float32"))
        for number, (label, options) in enumerate(KINDS.items()):
            kind = label.removesuffix("_lstm").removesuffix("_projected")
            where = make_adapter(home / name / label, source, kind, seed=number, **options)
            zoo.specimens.append(specimen(where, zoo.base, name=label))
        return source, zoo

    def fresh(name: str) -> Zoo:
        """The same adapters over a fresh base: an engine wraps the layers of its own."""
        source, known = populate(name)
        zoo = Zoo(source, load_base(source, device="cpu", dtype="float32"), known.specimens)
        zoo._oracles = known._oracles
        return zoo

    return fresh


@pytest.fixture
def zoo(zoos: Zoos) -> Zoo:
    return zoos("qwen3")


@pytest.fixture
def engine(zoo: Zoo) -> Iterator[Engine]:
    engine = start(zoo.base, zoo)
    yield engine
    if engine.alive:
        engine.check_integrity()
    engine.stop()


def ref(zoo: Zoo, name: str) -> AdapterRef:
    return zoo.named(name).ref()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(6, 500) for _ in range(length)]


def serve(engine: Engine, recorder: Recorder, zoo: Zoo, requests: list[Request]) -> None:
    """All at once; every output and every logits row is PEFT's for that adapter alone."""
    recorder.clear()
    with held(engine):
        streams = [engine.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        tokens, (end,) = collect(stream)
        assert (end.reason, end.error) == ("length", None)
        rows = recorder.rows(request.id)
        oracle = zoo.oracle(request.adapter.name if request.adapter else None)
        assert_equals_oracle(oracle, list(request.prompt), [t.id for t in tokens], rows)
    engine.check_integrity()
    assert engine._pool.used == 0


@pytest.mark.parametrize("name", ["qwen3", "mistral", pytest.param("gemma", marks=SLOW)])
def test_every_method_in_one_batch_equals_peft_alone(name: str, zoos: Zoos) -> None:
    """With prompts shorter and longer than a block and than a step, and the base beside them."""
    zoo = zoos(name)
    engine = start(zoo.base, zoo, max_step_tokens=48)
    recorder = Recorder(engine)
    try:
        for length in (1, 2, 60):
            requests = [
                greedy(f"{label}-{length}", prompt(length, number), label and ref(zoo, label), 6)
                for number, label in enumerate([None, *KINDS])
            ]
            serve(engine, recorder, zoo, requests)
    finally:
        engine.stop()


def test_the_tokens_are_those_of_peft_s_own_generate(engine: Engine, zoo: Zoo) -> None:
    for label, length in itertools.product(KINDS, (1, 3, 18)):
        tokens, _ = collect(engine.submit(greedy("1", prompt(length), ref(zoo, label), 8)))
        want = zoo.oracle(label).greedy(prompt(length), 8)
        assert min(want.gaps) > 1e-4, "a tie: choose another prompt"
        assert [token.id for token in tokens] == want.tokens


def test_preempted_sequences_come_back_behind_their_prefix(zoo: Zoo) -> None:
    """Blocks for a few sequences alone: prefixes leave the cache and are written again."""
    block = 16 * 2 * 2 * 32 * 4
    engine = start(zoo.base, zoo, kv_cache_bytes=24 * block, max_model_len=160)
    recorder, preempted = Recorder(engine), 0
    told = engine._observer.stepped
    try:

        def count(report: Any) -> None:
            nonlocal preempted
            preempted += report.preempted
            told(report)

        engine._observer.stepped = count  # type: ignore[method-assign]
        for turn in range(2):
            requests = [
                greedy(f"{turn}-{label}", prompt(30, number), label and ref(zoo, label), 40)
                for number, label in enumerate([None, *KINDS])
            ]
            serve(engine, recorder, zoo, requests)
        assert preempted > 0
    finally:
        engine.stop()


def test_a_known_prompt_is_found_behind_its_prefix(engine: Engine, zoo: Zoo) -> None:
    recorder = Recorder(engine)
    for label in ("p_tuning", "prefix_tuning", "multitask_prompt_tuning"):
        virtual = ref(zoo, label).virtual_tokens
        request = greedy("cold", prompt(50), ref(zoo, label), 4)
        serve(engine, recorder, zoo, [request])
        serve(engine, recorder, zoo, [replace(request, id="warm")])
        tokens, (end,) = collect(engine.submit(replace(request, id="again")))
        assert len(tokens) == 4
        assert end.cached_tokens == (virtual + 49) // 16 * 16 - virtual
        _, (other,) = collect(engine.submit(replace(request, id="tenant", tenant="b")))
        assert other.cached_tokens == 0


def test_sequences_of_one_adapter_share_the_blocks_of_its_prefix(zoo: Zoo) -> None:
    """Of 37 virtual tokens two blocks are shared, by all tenants; the third is each one's own."""
    engine = start(zoo.base, zoo)
    seen: list[list[int]] = []
    run = engine._runner.run

    def spy(batch: Any, adapters: Any) -> Any:
        seen[:] = [list(chunk.sequence.blocks) for chunk in batch.chunks]
        return run(batch, adapters)

    engine._runner.run = spy  # type: ignore[method-assign]
    requests = [greedy(str(i), prompt(5, i), ref(zoo, "prefix_tuning"), 30) for i in range(3)]
    with held(engine):  # so that the last step has all of them
        streams = [engine.submit(replace(r, tenant=r.id)) for r in requests]
    for stream in streams:
        collect(stream)
    assert len(seen) == 3
    assert len({tuple(blocks[:2]) for blocks in seen}) == 1
    assert len({blocks[2] for blocks in seen}) == 3
    engine.stop()


def test_a_prefix_that_nobody_uses_gives_its_blocks_back(engine: Engine, zoo: Zoo) -> None:
    one = ref(zoo, "prefix_tuning")
    collect(engine.submit(greedy("1", prompt(2), one, 4)))
    pool = engine._pool
    assert pool.used == 0
    owners = [block.owner for block in pool._blocks]
    assert owners.count(one.digest) == 2  # of 37 + 6 tokens in blocks of 16
    engine.forget(one.digest)
    assert one.digest not in [block.owner for block in pool._blocks]
    assert not [r for r in engine.residents() if r.digest == one.digest]


def test_the_context_shrinks_by_the_virtual_tokens(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo, max_model_len=64)
    one = ref(zoo, "prefix_tuning")  # 37
    tokens, (end,) = collect(engine.submit(greedy("1", prompt(20), one, 100)))
    assert (len(tokens), end.reason) == (7, "length")
    with pytest.raises(InvalidRequest, match="room for 27, behind 37 virtual tokens"):
        engine.submit(greedy("2", prompt(27), one))
    engine.stop()


def test_a_prefix_longer_than_the_context_is_refused(zoo: Zoo) -> None:
    engine = start(zoo.base, zoo, max_model_len=38)
    lowered = zoo.fetch(ref(zoo, "prefix_tuning"))
    with pytest.raises(InvalidAdapter, match=r"37 virtual tokens, .* server is 38: at most 36"):
        engine.probe(lowered)
    engine.probe(zoo.fetch(ref(zoo, "cpt")))
    engine.stop()


def test_a_trial_run_sees_the_virtual_tokens(engine: Engine, zoo: Zoo) -> None:
    lowered = zoo.fetch(ref(zoo, "cartridge"))
    assert lowered.prefix is not None
    engine.probe(lowered)
    bad = lowered.prefix.keys.clone()
    bad[1, 17] = float("inf")
    with pytest.raises(InvalidAdapter, match="not finite in a trial run"):
        engine.probe(replace(lowered, prefix=replace(lowered.prefix, keys=bad)))


@pytest.mark.parametrize("said", [0, 4])
def test_an_adapter_is_never_served_without_its_virtual_tokens(
    said: int, engine: Engine, zoo: Zoo
) -> None:
    wrong = replace(ref(zoo, "prompt_tuning"), virtual_tokens=said)
    _, (end,) = collect(engine.submit(greedy("1", prompt(5), wrong)))
    assert isinstance(end.error, GenerationFailed)
    assert f"5 virtual tokens, and its request says {said}" in str(end.error)
    tokens, _ = collect(engine.submit(greedy("2", prompt(5), ref(zoo, "prompt_tuning"), 4)))
    assert [t.id for t in tokens] == zoo.oracle("prompt_tuning").greedy(prompt(5), 4).tokens


def test_blocks_of_a_prefix_that_failed_are_not_taken_for_written(zoo: Zoo) -> None:
    good: LoweredAdapter = zoo.fetch(ref(zoo, "prefix_tuning"))
    engine = start(zoo.base, zoo)
    want = zoo.oracle("prefix_tuning").greedy(prompt(5), 4).tokens
    fill, broken = engine._runner.fill, [True, True]

    def fail(*given: Any) -> None:
        if broken:
            broken.pop()
            raise RuntimeError("no memory left")
        fill(*given)

    engine._runner.fill = fail  # type: ignore[method-assign]
    one = ref(zoo, "prefix_tuning")
    _, (end,) = collect(engine.submit(greedy("1", prompt(5), one, 4)))
    assert isinstance(end.error, GenerationFailed)
    tokens, _ = collect(engine.submit(greedy("2", prompt(5), one, 4)))
    assert [token.id for token in tokens] == want
    assert good.prefix is not None
    engine.stop()
