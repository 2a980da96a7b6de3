from __future__ import annotations

from dataclasses import replace

import pytest

from service.bench.scenario import (
    BASE,
    CHAT,
    COPIES,
    DISTINCT,
    FULL,
    MANY,
    PREFILL,
    QUICK,
    job,
    round_of,
)


def test_times_are_counted_from_the_common_arrival() -> None:
    result = round_of(10.0, [[11.0, 11.5, 12.5], [13.0, 13.25]])
    assert result.first_token == (1.0, 3.0)
    assert result.gaps == (0.5, 1.0, 0.25)
    assert result.seconds == 3.25
    assert result.tokens == 5
    assert result.tokens_per_second == pytest.approx(5 / 3.25)


def test_no_prompt_comes_twice_and_peers_get_the_same() -> None:
    jobs = [
        job(scenario, number, 512, prompt_tokens=64, new_tokens=8)
        for scenario in QUICK
        for number in range(4)
    ]
    prompts = [prompt for each in jobs for prompt in each.prompts]
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {64}
    assert job(DISTINCT, 2, 512, 64, 8) == job(DISTINCT, 2, 512, 64, 8)


def test_a_scenario_may_have_lengths_of_its_own() -> None:
    made = job(PREFILL, 1, 512, prompt_tokens=64, new_tokens=32)
    assert [len(prompt) for prompt in made.prompts] == [512]
    assert made.new_tokens == 1
    assert job(BASE, 1, 512, prompt_tokens=64, new_tokens=4).new_tokens == 4


def test_chats_share_their_beginning_within_a_round_only() -> None:
    first, second = (job(CHAT, number, 512, 64, 8).prompts for number in (1, 2))
    assert {prompt[:448] for prompt in first} == {first[0][:448]}
    assert len(set(first)) == len(first) == 8
    assert first[0][:448] != second[0][:448]


def test_an_answer_quotes_its_own_prompt_and_says_new_words_between() -> None:
    made = job(COPIES, 1, 50_000, prompt_tokens=64, new_tokens=32)
    assert made.new_tokens == 128
    assert {len(answer) for answer in made.answers} == {128}
    for prompt, answer in zip(made.prompts, made.answers, strict=True):
        for start in range(0, 120, 20):  # four new ones, sixteen of the prompt
            quote = answer[start + 4 : start + 20]
            assert any(prompt[at : at + 16] == quote for at in range(256 - 16))
    assert made.shortened(4) == replace(made, new_tokens=4)
    assert made.shortened(500) == made


def test_names_are_unique_and_the_many_are_distinct() -> None:
    assert len({scenario.name for scenario in FULL}) == len(FULL) == len(set(FULL))
    assert len(set(MANY.adapters)) == 32
