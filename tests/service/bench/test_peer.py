from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from service.bench.peer import PeerFailed, PeerProcess, Setup
from service.bench.scenario import BASE, Job, Round, job

JOB = job(BASE, 0, 100, 4, 2)


class Small:
    """A peer that computes nothing."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def run(self, job: Job, way: str) -> Round:
        if way == "die":
            os._exit(3)
        if way == "raise":
            raise ValueError("no such way")
        return Round(1.0, job.new_tokens, (0.5,), (0.5,))

    def facts(self) -> dict[str, object]:
        return {"pid": os.getpid(), **self.setup.options}

    def close(self) -> None:
        Path(str(self.setup.options["left"])).touch()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(Path("nowhere"), (), 1, {"answer": 42, "left": tmp_path / "left"})


def test_a_peer_answers_from_a_process_of_its_own_and_is_closed(setup: Setup) -> None:
    with closing(PeerProcess("small", Small, setup)) as peer:
        assert peer.run(JOB, "way").tokens == 2
        facts = peer.facts()
    assert facts["answer"] == 42
    assert facts["pid"] != os.getpid()
    assert Path(facts["left"]).exists()


def test_an_error_comes_back_with_its_traceback_and_the_peer_goes_on(setup: Setup) -> None:
    with closing(PeerProcess("small", Small, setup)) as peer:
        with pytest.raises(PeerFailed, match="no such way"):
            peer.run(JOB, "raise")
        assert peer.run(JOB, "way").tokens == 2


def test_a_dead_peer_is_named(setup: Setup) -> None:
    with (
        closing(PeerProcess("small", Small, setup)) as peer,
        pytest.raises(PeerFailed, match="small ended with 3"),
    ):
        peer.run(JOB, "die")
