"""`nibble plan fleet`: the fit, the queue against theory, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.bench.scenario import QUICK
from service.commands.plan import app
from service.plan.calibration import StepCost, UnusableBench, Work, calibrate
from service.plan.fleet import NoFleet, Targets, fewest, most, outcome, percentile
from service.plan.rendezvous import rendezvous
from service.plan.replay import rate_errors
from service.plan.simulation import (
    Request,
    Routing,
    Server,
    Traffic,
    replay,
    simulate,
)

COST = StepCost(
    fixed=0.020,
    row=0.002,
    adapter_row=0.001,
    adapter=0.003,
    prompt_token=0.0005,
    adapter_prompt_token=0.0001,
    prompts=0.004,
)
SERVER = Server(COST, kv_tokens=20_000, slots=8, load_seconds=0.1)


def bench(cost: StepCost = COST) -> dict[str, Any]:
    """The file of a machine whose steps cost exactly this."""
    rows = []
    for scenario in QUICK:
        used = [each for each in scenario.adapters if each is not None]
        many, kinds = len(scenario.adapters), len(set(used))
        first = cost.seconds(Work(0, 0, kinds, 64 * many, 64 * len(used)))
        gap = cost.seconds(Work(many, len(used), kinds))
        rows.append(
            {
                "scenario": scenario.name,
                "peer": "nibble fast",
                "tokens_per_second": many * 32 / (first + 31 * gap),
                "first_token_ms": {"p50": 1000 * first, "p99": 1000 * first},
                "inter_token_ms": {"p50": 1000 * gap, "p99": 1000 * gap},
            }
        )
    facts = {"kv_cache_bytes": 1 << 24, "token_bytes": 1 << 10, "each_adapter_bytes": [1 << 20]}
    return {
        "model": "m",
        "prompt_tokens": 64,
        "new_tokens": 32,
        "results": rows,
        "peers": {"nibble fast": facts},
        "memory": {"rss_bytes": 1 << 28},
    }


def test_the_fit_finds_the_costs_again() -> None:
    found = calibrate(bench())
    for name in StepCost.__slots__:
        assert getattr(found.cost, name) == pytest.approx(getattr(COST, name), rel=1e-6)
    assert found.worst_fit < 1e-6
    for error in rate_errors(bench(), found).values():
        # The first to come begins alone, which is a step more.
        assert -0.02 < error <= 1e-9, "replayed, the workloads take as long as they took"


def test_no_cost_is_negative() -> None:
    """A machine where adapters seem to make steps faster: noise, and fitted as none."""
    found = calibrate(bench(StepCost(0.02, 0.002, 0.0, -0.001, 0.0005, 0.0)))
    assert found.cost.adapter == 0
    assert 0 < found.worst_fit < 0.5


@pytest.mark.parametrize("prompt_token", [1e-5, 1e-4, 5e-4])
def test_reading_weights_is_hidden_by_computing_much(prompt_token: float) -> None:
    """On a GPU a prompt of 64 tokens costs what one token does, and eight of them may, too."""
    cost = StepCost(0.02, 0.0005, 0.0, 0.001, prompt_token, prompt_token / 4)
    assert cost.seconds(Work(prompt_tokens=64)) == max(0.02, 64 * prompt_token)
    found = calibrate(bench(cost))
    assert found.worst_fit < 1e-6
    assert found.cost.fixed == pytest.approx(0.02, rel=1e-6)
    if 512 * prompt_token > 0.02:
        assert found.cost.prompt_token == pytest.approx(prompt_token, rel=1e-6)


def test_what_a_step_of_prompts_takes_besides_its_tokens_is_no_token_s() -> None:
    """Of a prompt alone a token costs more than of eight at once, by the clock of one thread."""
    cost = StepCost(0.031, 0.0016, 0.0005, 0.0002, 0.0020, 0.0, prompts=0.037)
    found = calibrate(bench(cost))
    assert found.worst_fit < 1e-6
    assert found.cost.prompts == pytest.approx(0.037)
    assert found.cost.seconds(Work(3)) == pytest.approx(0.031 + 3 * 0.0016), "not of other steps"


def test_a_sequence_beside_a_prompt_costs_what_computing_its_token_does() -> None:
    reading = COST.seconds(Work(prompt_tokens=100))
    beside = COST.seconds(Work(7, prompt_tokens=100))
    assert beside - reading == pytest.approx(7 * (COST.row + COST.prompt_token))
    alone = COST.seconds(Work(7)) - COST.seconds(Work(6))
    assert alone == pytest.approx(COST.row), "hidden behind the weights"


@pytest.mark.parametrize("missing", ["results", "memory", "peers"])
def test_another_file_is_refused(missing: str) -> None:
    figures = bench()
    del figures[missing]
    with pytest.raises(UnusableBench, match=missing):
        calibrate(figures)
    with pytest.raises(UnusableBench, match="prompt_tokens should be at least 1"):
        calibrate(bench() | {"prompt_tokens": 0})
    with pytest.raises(UnusableBench, match="1 adapter"):
        calibrate(bench() | {"results": bench()["results"][:1]})


def test_one_request_alone_takes_its_steps() -> None:
    request = Request(1.0, 3, prompt=1000, left=5, tokens=1005, counted=True)
    done = replay([request], SERVER, 1, "adapter")
    first = 0.1 + sum(COST.seconds(Work(0, 0, 1, each, each)) for each in (512, 488))
    assert done.first == [pytest.approx(first)], "load, then two chunks"
    assert done.gaps == [(pytest.approx(COST.seconds(Work(1, 1, 1))), 4)]
    assert (done.finished, done.tokens, done.cold) == (1, 5, 1)


def test_a_newcomer_waits_for_the_step_that_runs_and_no_longer() -> None:
    long = Request(0.0, -1, prompt=1, left=1000, tokens=1001, counted=False)
    late = Request(0.5, -1, prompt=10, left=1, tokens=11, counted=True)
    done = replay([long, late], SERVER, 1, "least-busy")
    (first,) = done.first
    step = COST.seconds(Work(1, 0, 0, 10))
    assert step <= first <= step + COST.seconds(Work(1))


def test_sequences_wait_for_blocks() -> None:
    server = Server(COST, kv_tokens=100, slots=1, load_seconds=0.0)
    requests = [Request(0.0, -1, 50, 10, 60, True) for _ in range(2)]
    alone, second = replay(requests, server, 1, "least-busy").first
    took = COST.seconds(Work(prompt_tokens=50)) + 9 * COST.seconds(Work(1))
    assert second == pytest.approx(took + alone)


def test_slots_are_given_away_in_order_of_use() -> None:
    server = Server(COST, kv_tokens=1000, slots=2, load_seconds=0.0)
    order = [0, 1, 0, 2, 0, 1]
    requests = [Request(float(n), adapter, 1, 1, 2, True) for n, adapter in enumerate(order)]
    assert replay(requests, server, 1, "adapter").cold == 4, "0, 1, 2, and 1 again"


def test_a_queue_of_one_server_is_that_of_theory() -> None:
    """One at a time, always as long: M/D/1, whose mean wait is rho s / 2 (1 - rho)."""
    cost = StepCost(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)
    server = Server(cost, 1000, 1, 0.0, max_sequences=1)
    done = simulate(Traffic(7.0, 0, 0.0, 1, 1), server, 1, "least-busy", 20_000)
    waited = sum(done.first) / len(done.first) - 0.1
    assert waited == pytest.approx(0.7 * 0.1 / (2 * 0.3), rel=0.08)


def test_affinity_keeps_adapters_where_they_are() -> None:
    traffic = Traffic(rate=10.0, adapters=32, zipf=0.0, prompt_tokens=16, new_tokens=16)
    routings: tuple[Routing, ...] = ("adapter", "least-busy", "rendezvous")
    near, blind, hashed = (outcome(traffic, SERVER, 8, each) for each in routings)
    assert near.cold_rate < 0.7 * blind.cold_rate
    assert hashed.cold_rate < 0.1 * blind.cold_rate, "each has one home, and keeps it"


def test_a_hash_gives_each_replica_its_share_and_moves_no_more_than_it_must() -> None:
    before = [rendezvous(adapter, range(4))[0] for adapter in range(1000)]
    after = [rendezvous(adapter, range(5))[0] for adapter in range(1000)]
    assert all(200 < before.count(number) < 300 for number in range(4))
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {4}


def test_a_full_home_is_passed_over() -> None:
    server = Server(COST, kv_tokens=1000, slots=2, load_seconds=0.0, max_sequences=1)
    requests = [Request(0.0, 0, 1, 100, 101, True) for _ in range(2)]
    one, other = replay(requests, server, 2, "rendezvous").whole
    assert one == pytest.approx(other), "they ran side by side"


def test_the_fewest_meets_the_targets_and_one_less_does_not() -> None:
    traffic = Traffic(rate=20.0, adapters=16, zipf=1.0, prompt_tokens=128, new_tokens=32)
    targets = Targets(first_token=0.6, inter_token=0.2)
    found = fewest(traffic, SERVER, targets, "adapter")
    assert found.replicas > 1
    assert found.meets(targets)
    assert not outcome(traffic, SERVER, found.replicas - 1, "adapter").meets(targets)
    with pytest.raises(NoFleet, match="alone"):
        fewest(traffic, SERVER, Targets(0.01, 0.2), "adapter")


def test_a_load_that_outgrows_a_fleet_is_not_met_by_a_short_simulation() -> None:
    """Bounds so loose that nobody waits too long before the simulation ends."""
    cost = StepCost(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)
    server = Server(cost, 1000, 1, 0.0, max_sequences=1)
    traffic = Traffic(102.0, 0, 0.0, 1, 1)
    assert most(traffic, server) == pytest.approx(10.0)
    loose = Targets(first_token=20.0, inter_token=1.0)
    ten = outcome(traffic, server, 10, "least-busy")
    assert ten.first_token_p99 < loose.first_token
    assert ten.load == pytest.approx(1.02)
    assert not ten.meets(loose)
    assert fewest(traffic, server, loose, "least-busy").replicas == 11
    with pytest.raises(NoFleet, match="a replica does 10 requests/s at most: 4096 are too few"):
        fewest(Traffic(1e6, 0, 0.0, 1, 1), server, loose, "least-busy")


def test_a_full_queue_is_not_waited_for() -> None:
    traffic = Traffic(rate=1000.0, adapters=0, zipf=0.0, prompt_tokens=100, new_tokens=100)
    assert outcome(traffic, SERVER, 1, "least-busy").refused


def test_percentiles_of_counted_values() -> None:
    assert percentile([(3.0, 1), (1.0, 98), (2.0, 1)], 0.98) == 1.0
    assert percentile([(3.0, 1), (1.0, 98), (2.0, 1)], 0.99) == 2.0
    assert percentile([], 0.5) == 0.0


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench()))
    given = ["fleet", str(path), "--rate", "4", "--adapters", "8", "--hourly-cost", "0.5"]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["met"]
    assert found["hourly_cost"] == 0.5 * found["replicas"]
    assert found["memory_bytes"] == (1 << 28) + (1 << 24) + 32 * (1 << 20)
    assert CliRunner().invoke(app, given).exit_code == 0
    path.write_text("{}")
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 1
    assert "nibble bench --json" in refused.output
    path.write_text(json.dumps(bench()))
    for flag in ("--rate", "--zipf", "--first-token", "--hourly-cost"):
        for value in ("nan", "inf"):
            wrong = CliRunner().invoke(app, [*given, flag, value])
            assert wrong.exit_code != 0
            assert flag in wrong.output
    long = CliRunner().invoke(app, [*given, "--prompt-tokens", "20000"])
    assert long.exit_code == 1
    assert "KV cache of 16384" in long.output
