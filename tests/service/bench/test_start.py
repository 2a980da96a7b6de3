from __future__ import annotations

import pytest

from base.mini import MINI
from service.bench.scenario import BASE, job
from service.bench.start import SECOND_STARTS, budget, floor_seconds, measure_starts


def test_the_budget_is_weights_embeddings_keys_and_values_and_slack() -> None:
    memory = {"nf4_bytes": 100_000_000, "embedding_bytes": 7}
    assert budget(memory, 30) == 115_000_000 + 7 + 30 + 250_000_000


@pytest.mark.slow
def test_starts_of_the_embedded_base() -> None:
    figures = measure_starts(MINI, "fast", 1, job(BASE, 0, 512, 8, 4))
    assert len(figures["second_seconds_all"]) == SECOND_STARTS
    assert figures["second_seconds"] < figures["first_seconds"]
    assert figures["first_peak_bytes"] >= figures["rss_bytes"] > figures["anonymous_bytes"] > 0
    assert figures["shard_bytes"] > 1 << 20
    assert floor_seconds() > 0  # a start leaves half of torch out, so it may take less
