from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base.kernels import NF4Weight
from base.load import load_base
from base.nf4 import NF4Linear
from service.bench.nibble_peer import ENGINE, LOOKUP, NibblePeer
from service.bench.peer import Setup
from service.bench.peft_peer import MIXED, ONE_BATCH, ONE_BY_ONE, PeftPeer, to_bitsandbytes
from service.bench.scenario import BASE, DISTINCT, NONE, ONE, SAME, Round, Scenario, job
from service.bench.transformers_peer import CONTINUOUS, TransformersPeer
from service.engine.request import Finished, Token

NEW = 5


def _check(result: Round, scenario: Scenario) -> None:
    count = len(scenario.adapters)
    assert result.tokens == count * NEW
    assert len(result.first_token) == count
    assert len(result.gaps) == count * (NEW - 1)
    assert 0 < min(result.first_token) < result.seconds


@pytest.fixture
def peft(base_directory: Path, adapters: tuple[Path, ...]) -> PeftPeer:
    return PeftPeer(Setup(base_directory, adapters, 1, {"dtype": "float32"}))


@pytest.mark.parametrize(
    ("scenario", "way"),
    [
        (BASE, ONE_BY_ONE),
        (ONE, ONE_BY_ONE),
        (SAME, ONE_BATCH),
        (DISTINCT, ONE_BY_ONE),
        (DISTINCT, MIXED),
        (NONE, ONE_BATCH),
    ],
)
def test_peft_times_every_token_of_every_request(
    peft: PeftPeer, scenario: Scenario, way: str
) -> None:
    result = peft.run(job(scenario, 0, 512, 16, NEW), way)
    _check(result, scenario)
    waits = len(set(result.first_token))
    assert waits == (len(scenario.adapters) if way == ONE_BY_ONE else 1)


def test_peft_computes_on_the_same_nf4_bytes(base_directory: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    base = load_base(base_directory, device="cpu", dtype="float32")
    ours = [m for m in base.model.modules() if isinstance(m, NF4Linear)]
    theirs = to_bitsandbytes(base)
    assert len(theirs) == len(ours) > 0
    for mine, layer in zip(ours, theirs, strict=True):
        got = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(got, mine.weight.dequantize(torch.float32))
        assert isinstance(mine.weight, NF4Weight)
        assert layer.weight.data.data_ptr() == mine.weight.packed.data_ptr()


def test_peft_applies_the_adaptersto_bitsandbytes_layers(
    base_directory: Path, adapters: tuple[Path, ...]
) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    peer = PeftPeer(Setup(base_directory, adapters, 1, {"dtype": "float32"}))
    layers = [m for m in peer._model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert all(len(layer.lora_A) == len(adapters) for layer in layers)


@pytest.mark.parametrize("scenario", [BASE, ONE, SAME, DISTINCT])
def test_nibble_times_every_token_of_every_request(
    base_directory: Path, adapters: tuple[Path, ...], scenario: Scenario
) -> None:
    peer = NibblePeer(Setup(base_directory, adapters, 1, {}))
    try:
        _check(peer.run(job(scenario, 0, 512, 16, NEW), ENGINE), scenario)
        facts = peer.facts()
        assert facts["nf4_bytes"] > 0
        assert facts["rss_bytes"] > facts["nf4_bytes"] + facts["embedding_bytes"]
        assert facts["adapter_bytes"] > 8 * 4 * 4 * (64 + 64)
        assert sum(facts["each_adapter_bytes"]) == facts["adapter_bytes"]
        head = peer._base.model.get_output_embeddings().weight.nbytes
        assert facts["step_bytes"] == facts["nf4_bytes"] + head
        cache = peer._engine.kv_cache_bytes
        assert cache % (facts["token_bytes"] * peer._engine.config.block_size) == 0
    finally:
        peer.close()


def test_nibble_says_what_it_is_told_and_guesses_where_it_may(
    base_directory: Path, adapters: tuple[Path, ...]
) -> None:
    asked = job(Scenario("two", (None, 0), 40, 24, quoted=8), 0, 512, 40, 24)
    peer = NibblePeer(Setup(base_directory, adapters, 1, {}))
    said: list[tuple[int, ...]] = []
    guessed = []
    try:
        for way in (ENGINE, LOOKUP):
            assert peer.run(asked, way).tokens == 2 * 24
            streams = [peer._engine.submit(each) for each in peer._requests(asked, way)]
            for stream in streams:
                *tokens, last = stream.iterate()
                said.append(tuple(each.id for each in tokens if isinstance(each, Token)))
                assert isinstance(last, Finished)
                guessed.append(last.accepted_tokens)
    finally:
        peer.close()
    assert tuple(said) == 2 * tuple(answer[:24] for answer in asked.answers)
    assert guessed[:2] == [0, 0]
    assert min(guessed[2:]) > 4


@pytest.mark.slow
def test_transformers_times_every_token_of_every_request(base_directory: Path) -> None:
    peer = TransformersPeer(Setup(base_directory, (), 1, {}))
    try:
        for scenario in (BASE, NONE):
            _check(peer.run(job(scenario, 0, 512, 16, NEW), CONTINUOUS), scenario)
    finally:
        peer.close()
