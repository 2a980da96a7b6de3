from __future__ import annotations

import pytest

from service.bench.anchor import anchor
from service.bench.scenario import Job, Round


class Runner:
    """In a peer's place: its rounds take the given seconds, one after another."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.closed = False

    def run(self, job: Job, way: str) -> Round:
        seconds = self.seconds.pop(0)
        return Round(seconds, 60, (seconds,), (seconds,))

    def close(self) -> None:
        self.closed = True


def test_a_single_dtype_needs_no_trial() -> None:
    only = Runner()  # has no round to give
    best, rates = anchor({"a": only}.__getitem__, ["a"], vocabulary=512, prompt_tokens=4)  # type: ignore[arg-type]
    assert best is only  # type: ignore[comparison-overlap]
    assert not only.closed
    assert rates == {}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_faster_dtype_is_kept_whatever_disturbed_it(order: tuple[str, str]) -> None:
    peers = {"a": Runner(90.0, 9.0, 2.0, 9.0), "b": Runner(1.0, 3.0, 3.0, 3.0)}  # first: warm-up
    best, rates = anchor(peers.__getitem__, order, vocabulary=512, prompt_tokens=4)  # type: ignore[arg-type]
    assert best is peers["a"]  # type: ignore[comparison-overlap]
    assert (peers["a"].closed, peers["b"].closed) == (False, True)
    assert rates == {"a": 30.0, "b": 20.0}
