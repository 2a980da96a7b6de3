"""New tokens in a running engine: mixed with others, sampled, scored, and to the bit alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from base.load import Base, load_base
from service.engine.loop import Engine
from service.engine.request import Request, Sampling
from service.engine.sampler import Sampler
from service.engine.sequence import Sequence
from service.errors import InvalidRequest
from tests.oracle import VOCABULARY, make_adapter, make_base, random_tokens
from tests.zoo import Recorder, Zoo, assert_equals_oracle, collect, greedy, specimen, start

MORE = 5
LAST = VOCABULARY + MORE - 1
PROMPT = [*random_tokens(6), VOCABULARY, 9, LAST]
PLAIN = random_tokens(11, 2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    home = tmp_path_factory.mktemp("zoo")
    source = make_base(home / "base", "qwen3")
    zoo = Zoo(source, loaded(source, home))
    for seed, (name, kind) in enumerate({"plain": "lora", "wide": "new_tokens_trained"}.items()):
        zoo.specimens.append(
            specimen(make_adapter(home / name, source, kind, seed=seed + 1), zoo.base)
        )
    return zoo


@pytest.fixture(scope="module")
def engine(zoo: Zoo) -> Iterator[Engine]:
    running = start(zoo.base, zoo)
    yield running
    running.check_integrity()
    running.stop()


def loaded(source: Path, home: Path) -> Base:
    return load_base(source, device="cpu", dtype="float32", cache_dir=home / "cache")


def test_rows_of_all_widths_in_one_batch_equal_peft(zoo: Zoo, engine: Engine) -> None:
    run, recorder = engine._runner.run, Recorder(engine)
    asked = [("wide", PROMPT), (None, PLAIN), ("plain", PLAIN), ("wide", PROMPT[::-1])]
    requests = [
        greedy(str(i), prompt, zoo.named(name).ref() if name else None)
        for i, (name, prompt) in enumerate(asked)
    ]
    streams = [engine.submit(request) for request in requests]
    outputs = [[token.id for token in collect(stream)[0]] for stream in streams]
    for request, output, (name, prompt) in zip(requests, outputs, asked, strict=True):
        rows = recorder.rows(request.id)
        assert_equals_oracle(zoo.oracle(name), prompt, output, rows)
    for mixed, (name, prompt) in enumerate(asked):
        ref = zoo.named(name).ref() if name else None
        alone = engine.submit(greedy(f"alone {mixed}", prompt, ref))
        assert [token.id for token in collect(alone)[0]] == outputs[mixed]
    last = len(PLAIN) + 2  # a step of decoding: prefixes that are known are not computed again
    for number in ("1", "0"):
        assert torch.equal(recorder.rows(f"alone {number}")[last], recorder.rows(number)[last])
    engine._runner.run = run  # type: ignore[method-assign]


def test_new_tokens_come_out_for_their_adapter_alone(zoo: Zoo, engine: Engine) -> None:
    """Sampled hot, over all tokens: the adapter's rows reach new ones, the base's never do."""
    hot = Sampling(True, temperature=50.0, max_new_tokens=120, ignore_eos=True, seed=3)
    refs = {"wide": zoo.named("wide").ref(), "base": None}
    streams = {
        name: engine.submit(Request(name, tuple(PLAIN), hot, ref, n=4))
        for name, ref in refs.items()
    }
    found = {name: [t.id for t in collect(stream)[0]] for name, stream in streams.items()}
    assert max(found["base"]) < VOCABULARY <= max(found["wide"]) <= LAST


def test_logprobs_are_over_the_sequences_own_vocabulary(zoo: Zoo, engine: Engine) -> None:
    options = Sampling(max_new_tokens=1, ignore_eos=True, top_logprobs=VOCABULARY + MORE)
    for name, prompt, width in (("wide", PROMPT, VOCABULARY + MORE), (None, PLAIN, VOCABULARY)):
        ref = zoo.named(name).ref() if name else None
        request = Request(str(name), tuple(prompt), options, ref, prompt_logprobs=True)
        tokens, ends = collect(engine.submit(request))
        want = zoo.oracle(name).logits(prompt).log_softmax(-1)
        assert len(tokens[0].top) == width
        assert sum(2.718281828459045**p for _, _, p in tokens[0].top) == pytest.approx(1, abs=1e-4)
        scored = [float(want[i, token]) for i, token in enumerate(prompt[1:])]
        assert ends[0].prompt_logprobs == pytest.approx(scored, abs=1e-3)


def test_token_ids_are_bounded_by_whose_they_are(zoo: Zoo, engine: Engine) -> None:
    for ref, bound in ((None, VOCABULARY), (zoo.named("wide").ref(), LAST + 1)):
        with pytest.raises(InvalidRequest, match=f"token id {bound} .* vocabulary of {bound}"):
            engine.submit(Request("r", (1, bound), Sampling(), ref))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(True, temperature=0.7, top_k=3, seed=1),
        Sampling(True, top_p=0.5, seed=2),
        Sampling(repetition_penalty=1.3),
        Sampling(top_logprobs=4),
    ],
)
def test_a_row_is_sampled_alike_beside_a_wider_one(sampling: Sampling, zoo: Zoo) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, VOCABULARY + MORE)
    logits[0, VOCABULARY:] = 100.0  # whatever stands there, it is not the base's
    ref = zoo.named("wide").ref()
    own, wide = (
        Sequence(i, Request("r", (1, 2), sampling, r), 0, sampling.seed or 0, [1, 2], 2, b"")
        for i, r in enumerate((None, ref))
    )
    sampler = Sampler(frozenset({3}), VOCABULARY)
    first, second = sampler.sample(logits, [own, wide])
    assert [first] == sampler.sample(logits[:1, :VOCABULARY].clone(), [own])
    assert [second] == sampler.sample(logits[1:].clone(), [wide])
