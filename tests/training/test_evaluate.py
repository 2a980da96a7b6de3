from __future__ import annotations

from pathlib import Path

import pytest

from base.load import Base
from tests.oracle import PeftOracle
from training.evaluate import ExactMatch, exact_match, generate

PROMPTS = [[7, 8, 9], [5] * 20, [11], [30, 31, 32, 33], [7, 8, 9]]


def test_a_batch_says_what_each_prompt_alone_would(base: Base, base_directory: Path) -> None:
    oracle = PeftOracle(base_directory)
    stop = base.tokenizer.eos_token_id
    alone = []
    for prompt in PROMPTS:
        tokens = [t for t in oracle.greedy(prompt, 12, stop=(stop,)).tokens if t != stop]
        alone.append(base.tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(alone)) > 2
    for batch_size in (1, 3, 8):
        assert generate(base, PROMPTS, max_new_tokens=12, batch_size=batch_size) == alone


def test_exact_match_counts_and_reports(base: Base) -> None:
    said = generate(base, PROMPTS, max_new_tokens=3)
    heard: list[int] = []
    answers = [f" {said[0]}\n", "never", *said[2:]]
    score = exact_match(base, PROMPTS, answers, max_new_tokens=3, batch_size=2, report=heard.append)
    assert (score.right, score.total) == (4, 5)
    assert heard == [2, 4, 5]


def test_the_interval_is_wilsons() -> None:
    low, high = ExactMatch(8, 10).interval
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert ExactMatch(0, 500).interval[0] == 0.0
    assert ExactMatch(500, 500).interval == (pytest.approx(0.9924, abs=1e-4), 1.0)
