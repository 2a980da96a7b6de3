"""What the bench of training beside serving makes of its times, and its server on the way."""

from __future__ import annotations

import pytest
from rich.console import Console

from base.mini import MINI
from service.bench.beside import ALONE, BESIDE, Setting, Times, _figures, beside_table
from service.bench.beside import measure as measure_beside


def test_figures_and_their_ratios() -> None:
    alone = Times([0.1] * 19 + [0.2], [0.01], [1.0], tokens=40, seconds=2.0)
    beside = Times([0.2] * 18 + [0.4] * 2, [0.02], [2.0], tokens=20, steps=4, seconds=2.0)
    figures = {ALONE: _figures(alone), BESIDE: _figures(beside)}
    assert figures[ALONE]["first_token_p95_ms"] == pytest.approx(100)
    assert figures[BESIDE]["first_token_p95_ms"] == pytest.approx(400)
    assert figures[BESIDE]["training_steps_per_second"] == 2
    console = Console(record=True, width=120)
    console.print(beside_table({**figures, "steps_per_second_without_requests": 3.0}))
    (row,) = [line for line in console.export_text().splitlines() if "first_token_p95" in line]
    assert "4.00" in row


@pytest.mark.slow
def test_the_whole_measurement() -> None:
    setting = Setting(MINI, rounds=1, seconds=2, clients=2, new_tokens=4, rank=2, batch_size=2)
    rounds: list[str] = []
    figures = measure_beside(setting, lambda sort, number: rounds.append(sort))
    assert rounds == [ALONE, BESIDE]
    assert figures[ALONE]["training_steps_per_second"] == 0
    assert figures[BESIDE]["requests"] >= 2
    assert figures["steps_per_second_without_requests"] > 0
