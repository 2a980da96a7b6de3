from __future__ import annotations

import pytest

from service.bench.scenario import DISTINCT, SCENARIOS, job, round_of


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
        for scenario in SCENARIOS
        for number in range(4)
    ]
    prompts = [prompt for each in jobs for prompt in each.prompts]
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {64}
    assert job(DISTINCT, 2, 512, 64, 8) == job(DISTINCT, 2, 512, 64, 8)
