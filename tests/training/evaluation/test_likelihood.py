from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from base.load import Base
from tests.training.runs import run_of
from training.data import Example
from training.evaluate import _greedy
from training.evaluation import likelihood
from training.evaluation.likelihood import Likelihood, choose, likelihoods
from training.methods import Attached, attach


def examples(base: Base, count: int, lead: int = 0) -> list[Example]:
    """Random tokens; the first `lead` are the same in all."""
    chance = random.Random(count + lead)
    top = base.spec.vocab_size - 1
    before = [chance.randint(4, top) for _ in range(lead)]
    found = []
    for _ in range(count):
        prompt = [*before, *(chance.randint(4, top) for _ in range(chance.randint(1, 9)))]
        answer = [chance.randint(4, top) for _ in range(chance.randint(1, 6))]
        found.append(Example((*prompt, *answer), len(prompt)))
    return found


def one_by_one(base: Base, data: list[Example]) -> list[float]:
    """The summed loss of each answer, a row at a time, from all logits."""
    found = []
    for example in data:
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0]
        said = torch.tensor(example.tokens[example.answer_start :])
        rows = logits[example.answer_start - 1 : -1]
        found.append(F.cross_entropy(rows.float(), said, reduction="sum").item())
    return found


@pytest.mark.parametrize("lead", [0, 60])
def test_a_batch_gives_what_each_answer_alone_would(base: Base, lead: int) -> None:
    data = examples(base, 12, lead)
    assert (likelihood._shared(data) >= likelihood.WORTH) == bool(lead)
    for size in (1, 5, 64):
        got = likelihoods(base, data, batch_size=size)
        assert [one.nats for one in got] == pytest.approx(one_by_one(base, data), rel=1e-4)
        assert [one.tokens for one in got] == [example.loss_tokens for example in data]


def test_what_greedy_decoding_says_is_exact_and_nothing_else_is(base: Base) -> None:
    prompts = [example.tokens[: example.answer_start] for example in examples(base, 8)]
    said = _greedy(base, prompts, 6, None)
    right = [Example((*p, *s), len(p)) for p, s in zip(prompts, said, strict=True)]
    assert all(one.exact for one in likelihoods(base, right))
    wrong = [Example((*p, *s[:-1], s[-1] ^ 1), len(p)) for p, s in zip(prompts, said, strict=True)]
    assert not any(one.exact for one in likelihoods(base, wrong))


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning", "prefix_tuning"])
def test_an_adapter_is_heard_behind_a_common_beginning(base: Base, kind: str) -> None:
    config = run_of(kind, **({"rank": 4} if kind == "lora" else {"virtual_tokens": 3}))
    torch.manual_seed(0)
    adapter: Attached = attach(base, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    data = examples(base, 6, 60)
    got = [one.nats for one in likelihoods(base, data, adapter=adapter)]
    alone = [likelihoods(base, [each], adapter=adapter)[0].nats for each in data]
    adapter.detach()
    assert got == pytest.approx(alone, rel=1e-4)
    assert got != pytest.approx([one.nats for one in likelihoods(base, data)], rel=1e-3)


def test_the_most_likely_choice_is_taken() -> None:
    def of(*nats: float) -> list[Likelihood]:
        return [Likelihood(each, 1, False) for each in nats]

    assert choose([of(2.0, 1.0, 3.0), of(1.0, 1.0)]) == [1, 0]
