from __future__ import annotations

import pytest

from service.bench.anchor import anchor
from service.bench.scenario import Job, Round


class Runner:
    """In a peer's place: needs `seconds` for a round, the first time ten times as many."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.warm = False
        self.closed = False

    def run(self, job: Job, way: str) -> Round:
        seconds = self.seconds * (1 if self.warm else 10)
        self.warm = True
        return Round(seconds, 60, (seconds,), (seconds,))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_faster_dtype_is_kept_and_the_other_closed(order: tuple[str, str]) -> None:
    peers = {"a": Runner(2.0), "b": Runner(3.0)}
    best, rates = anchor(peers.__getitem__, order, vocabulary=512, prompt_tokens=4)  # type: ignore[arg-type]
    assert best is peers["a"]  # type: ignore[comparison-overlap]
    assert (peers["a"].closed, peers["b"].closed) == (False, True)
    assert rates == {"a": 30.0, "b": 20.0}  # warm, not cold
