"""The fleet's simulation held against servers: what is compared, and one short run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from base.mini import MINI
from deploy.load import fleet, replicas
from deploy.load.client import Reply
from service.bench.scenario import DISTINCT
from service.plan.simulation import Measured, Server, Traffic, arrivals, replay
from tests.service.plan.test_fleet import COST, bench

TRAFFIC = Traffic(rate=5.0, adapters=4, zipf=1.0, prompt_tokens=32, new_tokens=8)
SERVER = Server(COST, kv_tokens=20_000, slots=4, load_seconds=0.0)


def _as_simulated(slower: float = 1.0) -> tuple[list[Reply], Measured]:
    """Replies of a machine that does what the simulation says, `slower` times as slowly."""
    due = arrivals(TRAFFIC, 100, 0)
    simulated = replay([replace(each, counted=True) for each in due], SERVER, 2, "rendezvous")
    replies = [
        Reply("a", first=slower * first, last=slower * whole, tokens=8)
        for first, whole in zip(sorted(simulated.first), sorted(simulated.whole), strict=True)
    ]
    replies[-1].gaps = [slower * gap for gap, often in simulated.gaps for _ in range(often)]
    return replies, simulated


def test_a_machine_that_does_as_foretold_has_no_error() -> None:
    due = [replace(each, counted=True) for each in arrivals(TRAFFIC, 100, 0)]
    replies, simulated = _as_simulated()
    rows = {row.name: row for row in fleet.compared(due, replies, simulated)}
    assert set(rows) == {
        "tokens/s",
        *(
            f"{name} p{part} (s)"
            for name in ("first token", "whole reply", "between tokens")
            for part in (50, 90, 99)
        ),
    }
    for name, row in rows.items():
        near = 0.02 if name == "tokens/s" or name.startswith("between") else 1e-9
        assert row.error == pytest.approx(0, abs=near), name
    twice, _ = _as_simulated(2.0)
    late = {row.name: row for row in fleet.compared(due, twice, simulated)}
    assert late["first token p50 (s)"].error == pytest.approx(-0.5)


def test_a_failed_request_is_no_figure() -> None:
    due = [replace(each, counted=True) for each in arrivals(TRAFFIC, 100, 0)]
    replies, simulated = _as_simulated()
    replies[3].fault = "HTTP 503"
    with pytest.raises(SystemExit, match="HTTP 503"):
        fleet.compared(due, replies, simulated)


def test_a_bench_of_other_threads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({**bench(), "threads": 2}))
    monkeypatch.setattr(sys, "argv", ["fleet", str(file), "--rate", "1"])
    with pytest.raises(SystemExit, match="is of 2 threads"):
        fleet.main()


@pytest.mark.parametrize("given", [[], ["--base", "mini", "--rate", "2"]])
def test_base_and_rate_are_the_bench_s_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    class Enough(Exception):
        pass

    def run(asked: argparse.Namespace, due: object) -> None:
        rate = 2.0 if given else 0.6 * 3 * distinct / 16
        assert (asked.base, asked.rate) == (str(MINI), pytest.approx(rate))
        raise Enough

    figures = {**bench(), "threads": 1, "model": "mini"}
    rows = figures["results"]
    (distinct,) = (r["tokens_per_second"] for r in rows if r["scenario"] == DISTINCT.name)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(figures))
    monkeypatch.setattr(fleet, "_run", run)
    asked = ["fleet", str(file), "--replicas", "3", "--new-tokens", "16", *given]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(Enough):
        fleet.main()


def test_replicas_are_compared_round_by_round() -> None:
    rates = {"direct": [10.0, 20.0], "Ray, one": [9.0, 19.0], "Ray, two": [18.0, 19.0]}
    *_, direct, one, two = replicas.table("tokens/s", rates).splitlines()
    assert direct == "| direct | 15.0 |  |"
    assert one == "| Ray, one | 14.0 | 0.93 (0.90 to 0.95) |"
    assert two == "| Ray, two | 18.5 | 1.50 (1.00 to 2.00) |"


@pytest.mark.parametrize("wrong", ["--replicas", "--rate", "--new-tokens"])
def test_numbers_that_mean_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fleet", "bench.json", wrong, "0"])
    with pytest.raises(SystemExit):
        fleet.main()
    assert f"{wrong} should be more than 0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_servers_beside_their_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "bench.json", tmp_path / "out.json"
    file.write_text(json.dumps({**bench(), "threads": 1, "model": "mini"}))
    given = ["--rate", "4", "--requests", "20", "--adapters", "3", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["fleet", str(file), *given, "--json", str(out)])
    fleet.main()
    found = json.loads(out.read_text())
    assert found["replicas"] == 2
    assert found["rows"][-1]["name"] == "servers' processor time (s)"
    assert all(row["measured"] > 0 and row["simulated"] > 0 for row in found["rows"])
    assert "| tokens/s |" in capsys.readouterr().out
