"""The sampler against transformers' own processors, and its promises about seeds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine.request import Request, Sampling
from service.engine.sampler import Sampler, truncate, uniform
from service.engine.sequence import Sequence

EOS = 3


def make(sampling: Sampling, tokens: list[int] | None = None, prompt: int = 2) -> Sequence:
    tokens = tokens or [1, 2]
    request = Request("r", tuple(tokens[:prompt]), sampling)
    return Sequence(1, request, 0, sampling.seed or 0, tokens, prompt, b"")


def choose(logits: torch.Tensor, sequence: Sequence) -> int:
    sampled = Sampler(frozenset({EOS})).sample(logits[None], [sequence])[0]
    assert sampled is not None
    return sampled.token


def test_greedy_takes_the_largest_and_reports_its_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    sampled = Sampler(frozenset({EOS})).sample(logits, [make(Sampling(top_logprobs=2))])[0]
    assert sampled is not None
    assert sampled.token == 1
    expected = logits[0].log_softmax(-1)
    assert sampled.logprob == pytest.approx(float(expected[1]), abs=1e-6)
    assert [token for token, _ in sampled.top] == [1, 2]


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(True, temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(True, top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(True, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Sampling(True, top_p=0.01), [TopPLogitsWarper(0.01)]),
        (Sampling(True, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            Sampling(True, temperature=1.5, top_k=9, top_p=0.9, min_p=0.05),
            [
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(9),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_probabilities_are_those_of_transformers(sampling: Sampling, processors: list) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    values, tokens = (logits / sampling.temperature).sort(descending=True)
    own = torch.zeros(50).scatter(0, tokens, truncate(values, sampling))
    theirs = LogitsProcessorList(processors)(torch.tensor([[1]]), logits[None].clone())
    torch.testing.assert_close(own / own.sum(), theirs[0].softmax(-1))


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 0.0])
    counts = Counter(choose(logits, make(Sampling(True, seed=seed))) for seed in range(4000))
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_a_seed_and_a_position_decide_whatever_stands_beside() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    sequence = make(Sampling(True, seed=11))
    others = [make(Sampling(True, seed=s)) for s in range(5)]
    sampler = Sampler(frozenset({EOS}))
    alone = sampler.sample(logits[:1], [sequence])[0]
    together = sampler.sample(logits.flip(0), [*others, sequence])[-1]
    assert alone == together
    assert uniform(11, 2) != uniform(11, 3)
    assert uniform(11, 2) != uniform(12, 2)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(2))
    tokens = [4, 7, 7, 9]
    theirs = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([tokens]), logits[None].clone())
    for winner in tokens:
        boosted = logits.clone()
        boosted[winner] += 6
        own = choose(boosted, make(Sampling(repetition_penalty=1.8), tokens))
        want = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([tokens]), boosted[None].clone())
        assert own == int(want.argmax())
    assert choose(logits, make(Sampling(repetition_penalty=1.8), tokens)) == int(theirs.argmax())


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0, -5.0])
    assert choose(logits, make(Sampling(presence_penalty=0.5), [0, 0])) == 0
    assert choose(logits, make(Sampling(presence_penalty=0.5), [0, 2, 0])) == 1
    assert choose(logits, make(Sampling(frequency_penalty=0.06), [0, 2, 0])) == 0
    assert choose(logits, make(Sampling(frequency_penalty=0.06), [0, 2, 0, 0])) == 1


def test_the_end_is_impossible_before_the_shortest_output() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    sampling = Sampling(min_new_tokens=1, stop_token_ids=(2,))
    assert choose(logits, make(sampling)) == 1
    assert choose(logits, make(sampling, [1, 2, 0])) == EOS


def test_an_end_that_is_ignored_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([0.0, 1.0, 8.0, 9.0])
    stops = Sampling(min_new_tokens=1, ignore_eos=True, stop_token_ids=(3,))
    assert choose(logits, make(stops)) == 2  # EOS is a stop token here, by the client's own word
    monkeypatch.setattr(Sampler, "_choose", None)  # a row that is not touched needs no copy
    assert choose(logits, make(Sampling(min_new_tokens=1, ignore_eos=True))) == EOS


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = float("nan")
    result = Sampler(frozenset({EOS})).sample(logits, [make(Sampling()) for _ in range(3)])
    assert result[1] is None
    assert result[0] == result[2]
    assert result[0] is not None


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_no_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(True, temperature=temperature, seed=1)
    assert choose(logits, make(sampling)) == int(logits.argmax())
