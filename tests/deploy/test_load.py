"""Load tests: the traffic is what its name says, the figures are right, the files fit the tools."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import yaml

from deploy.load import configurations, report
from deploy.load.__main__ import main
from deploy.load.adapters import names, upload
from deploy.load.client import Reply, ask
from deploy.load.measure import Phase
from deploy.load.server import served
from deploy.load.workloads import BASE, CLOSED, OPEN, Workload, prompt
from tests.deploy.manifests import ROOT

LOAD = ROOT / "deploy" / "load"
NAMES = names(16)
TOOLS = ROOT / ".venv-load" / "bin" / "python"
BY_NAME = {workload.name: workload for workload in (*CLOSED, *OPEN)}


def test_who_is_asked_for() -> None:
    asked = {name: one.adapters(NAMES, 4000, seed=1) for name, one in BY_NAME.items()}
    assert set(asked["base only"]) == {None}
    assert set(asked["identical"]) == {NAMES[0]}
    assert asked["distinct"][:32] == [*NAMES, *NAMES], "no two that run together share one"
    uniform = Counter(asked["uniform"])
    assert set(uniform) == set(NAMES)
    assert max(uniform.values()) < 1.5 * min(uniform.values())
    for name, exponent in (("Zipf 1.0", 1.0), ("Zipf 1.5", 1.5)):
        counts = Counter(asked[name])
        for place in (1, 2, 4):
            share = place**-exponent / sum(k**-exponent for k in range(1, 17))
            assert counts[NAMES[place - 1]] / 4000 == pytest.approx(share, abs=0.03)
    assert asked["Zipf 1.0"] == BY_NAME["Zipf 1.0"].adapters(NAMES, 4000, seed=1)
    assert asked["Zipf 1.0"] != BY_NAME["Zipf 1.0"].adapters(NAMES, 4000, seed=2)


def test_when_they_arrive() -> None:
    poisson = BY_NAME["Poisson, Zipf 1.0"].arrivals(4000, rate=10.0, burst=8, seed=1)
    assert poisson is not None
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1), "as wide as its mean"
    bursts = BY_NAME["bursts, Zipf 1.0"].arrivals(24, rate=4.0, burst=8, seed=1)
    assert bursts == [0.0] * 8 + [2.0] * 8 + [4.0] * 8
    assert BASE.arrivals(4, rate=1.0, burst=1, seed=1) is None


def test_no_two_prompts_begin_alike() -> None:
    begun = {prompt(number, 10, seed).split()[0] for number in range(200) for seed in (1, 2)}
    assert len(begun) > 390


def phase(workload: Workload, number: int, tokens: int, *replies: Reply, **more: Any) -> Phase:
    for reply in replies:
        reply.tokens = tokens
    found = {"slot": 0.0, "host": 0.0, "store": 0.0} | more.get("found", {})
    return Phase(workload, number, 2.0, replies, found, more.get("loads", ()), more.get("n", 0))


def reply(first: float = 0.1, last: float = 0.4, fault: str = "") -> Reply:
    return Reply(None, first, last, [(last - first) / 3] * 3, fault=fault)


def test_figures() -> None:
    zipf = BY_NAME["Zipf 1.0"]
    phases = [
        phase(BASE, 0, 4, *(reply() for _ in range(4))),
        phase(
            *(zipf, 0, 4, reply(), reply(first=0.9, last=1.9), reply(fault="HTTP 429")),
            found={"slot": 1, "host": 1, "store": 2},
            loads=[(0.1, 1), (0.2, 2), (math.inf, 2)],
            n=3,
        ),
        phase(zipf, 1, 4, reply(), found={"slot": 0, "store": 0}, n=1),
        phase(BASE, 1, 4, reply()),
    ]
    base, mixed = report.figures(phases, first=0.5, per_token=0.2)
    assert base["slowdown"] == 1.0
    assert base["tokens_per_second"] == statistics.median([8.0, 2.0])
    assert base["hit_rate"] is None
    # 16 tokens in 2 s against 8 in its own round, and 4 against 4 in the other.
    assert mixed["slowdown"] == statistics.median([2.0, 1.0])
    assert (mixed["requests"], mixed["failed"], mixed["adapters"]) == (4, {"HTTP 429": 1}, 3)
    assert mixed["ttft_ms"] == {"p50": 100.0, "p90": 900.0, "p99": 900.0}
    assert mixed["e2e_ms"]["p99"] == 1900.0
    assert mixed["goodput"] == 0.5, "two of four in four seconds: one failed, one came late"
    assert mixed["attained"] == 0.5
    assert mixed["hit_rate"] == 0.5
    assert mixed["cold_loads"] == 2
    assert mixed["cold_load_ms"] == {"p50": 100.0, "p90": 180.0, "p99": 198.0}


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--rate", "0", "--rate is 0.0; should be more than 0"),
        ("--ttft-ms", "nan", "--ttft-ms is nan"),
        ("--prompt-words", "-1", "--prompt-words is -1; should be at least 1"),
        ("--url", "http://127.0.0.1:1", "http://127.0.0.1:1 does not answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["load", flag, value])
    with pytest.raises(SystemExit) as ended:
        main()
    assert said in capsys.readouterr().err + str(ended.value)


def test_requests_by_the_clock_have_no_slowdown() -> None:
    phases = [phase(BASE, 0, 4, reply()), phase(OPEN[0], 0, 4, reply())]
    assert [row["slowdown"] for row in report.figures(phases, 1, 1)] == [1.0, None]


def test_a_report_shows_the_slowdown_and_its_plots(tmp_path: Path) -> None:
    phases = [phase(one, 0, 4, reply(), reply(0.2, 0.9)) for one in (*CLOSED, *OPEN)]
    rows = report.figures(phases, 1, 1)
    page = report.write(tmp_path, phases, rows, {"machine": "two cores"}).read_text()
    assert "machine: two cores" in page
    assert page.count("1.00×") == len(CLOSED)
    for name in ("slowdown.svg", "ttft.svg", "itl.svg", "e2e.svg"):
        assert f"]({name})" in page
        picture = ElementTree.fromstring((tmp_path / name).read_text())
        assert picture.tag.endswith("svg")
    assert len(json.loads((tmp_path / "report.json").read_text())["workloads"]) == len(rows)


def streaming(*lines: str, status: int = 200) -> Reply:
    body = "".join(f"{line}\n\n" for line in lines)

    async def asked() -> Reply:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await ask(http, "mini", None, "text", 2, time.perf_counter())

    return asyncio.run(asked())


def test_a_reply_is_what_came() -> None:
    one, usage = 'data: {"choices": [{"text": "a"}]}', '"usage": {"completion_tokens": 2}'
    good = streaming(one, one, f'data: {{"choices": [], {usage}}}', "data: [DONE]")
    assert (good.fault, good.tokens, len(good.gaps)) == ("", 2, 1)
    assert 0 < good.first <= good.last
    end = 'data: {"choices": [{"text": "", "finish_reason": "length"}]}'
    mute = streaming(end, f'data: {{"choices": [], {usage}}}', "data: [DONE]")
    assert (mute.fault, mute.gaps) == ("", []), "two tokens without a letter"
    assert 0 < mute.first == mute.last
    assert streaming(one, "data: [DONE]").fault == "0 tokens of 2"
    assert streaming(one, 'data: {"error": {"message": "x"}}').fault == "error in the stream"
    assert streaming(status=429).fault == "HTTP 429"


def test_the_tools_files_are_what_makes_them() -> None:
    made = configurations.configurations(configurations.Target())
    lying = {str(path.relative_to(LOAD)) for path in LOAD.glob("*/*.yaml")}
    assert lying == set(made)
    for path, content in made.items():
        assert yaml.safe_load((LOAD / path).read_text()) == content
        parts = content.get("load", {}).get("lora_traffic_split")
        assert parts is None or sum(part["split"] for part in parts) == 1.0
    tokenizer = ROOT / configurations.Target().tokenizer
    assert (tokenizer / "tokenizer.json").is_file(), "a directory, or the tools would ask a hub"


READ = """
import sys
from pathlib import Path
from inference_perf.config import read_config
from guidellm.benchmark.entrypoints import resolve_to_single_benchmark
from guidellm.schemas.benchmark.entrypoints import BenchmarkScenario
for path in Path(sys.argv[1], "inference-perf").glob("*.yaml"):
    print(path.stem, read_config(str(path)).load.type.value)
for path in Path(sys.argv[1], "guidellm").glob("*.yaml"):
    found = resolve_to_single_benchmark(BenchmarkScenario.create(path).get_benchmarks())
    print(path.stem, found.backend.model, found.profile.kind)
"""


@pytest.mark.slow
def test_the_tools_take_their_files() -> None:
    if not TOOLS.exists():
        pytest.skip("`make load-tools` installs inference-perf, GuideLLM and locust")
    done = subprocess.run(
        [str(TOOLS), "-W", "ignore", "-c", READ, str(LOAD)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "zipf-1.0 poisson" in done.stdout
    assert "identical-poisson load-0000 poisson" in done.stdout


@pytest.fixture(scope="module")
def measured() -> Iterator[str]:
    """The address of a server with four adapters for others' tools."""
    if not TOOLS.exists():
        pytest.skip("`make load-tools` installs inference-perf, GuideLLM and locust")
    with served(None, []) as url:
        with httpx.Client(base_url=url, timeout=120) as http:
            upload(http, ROOT / "training" / "samples" / "cipher", 4, print)
        yield url


def tool(*words: str) -> str:
    """What one of them says, who may ask no hub."""
    offline = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    done = subprocess.run(
        [str(TOOLS.with_name(words[0])), *words[1:]],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def short(url: str, out: Path, seconds: int = 3) -> configurations.Target:
    results = str(out / "results")
    target = configurations.Target(url=url, adapters=4, seconds=seconds, results=results)
    configurations.write(out, target)
    return target


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inference_perf_measures_adapters(measured: str, tmp_path: Path) -> None:
    short(measured, tmp_path)
    tool("inference-perf", "--config_file", str(tmp_path / "inference-perf" / "zipf-1.0.yaml"))
    (found,) = tmp_path.glob("results/inference-perf/*")
    summary = json.loads((found / "summary_lifecycle_metrics.json").read_text())
    asked = 3 * sum(rate for rate, _ in configurations.STEADY)
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (asked, 0)
    each = [json.loads(path.read_text()) for path in found.glob("adapter_load-*.json")]
    assert 2 <= len(each) <= 4
    assert sum(one["successes"]["count"] for one in each) == asked


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_guidellm_measures_an_adapter(measured: str, tmp_path: Path) -> None:
    short(measured, tmp_path, seconds=12)  # it counts what has ended by then, of 16 at once
    tool("guidellm", "run", "--scenario", str(tmp_path / "guidellm" / "identical.yaml"))
    found = json.loads((tmp_path / "results" / "guidellm" / "identical.json").read_text())
    for one in found["benchmarks"]:
        totals = one["metrics"]["request_totals"]
        assert totals["successful"] > 0
        assert totals["errored"] == 0
    assert len(found["benchmarks"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_locust_finds_no_fault(measured: str) -> None:
    plan = [
        *("--headless", "-u", "4", "-r", "4", "-t", "20s", "--only-summary"),
        "--host",
        measured,
    ]
    said = tool("locust", "-f", str(LOAD / "locustfile.py"), *plan)
    assert "first token" in said
    assert "/adapters/NAME" in said


@pytest.mark.slow
def test_a_short_one_against_a_server_of_its_own(tmp_path: Path) -> None:
    little = ["--adapters=8", "--resident=2", "--requests=8", "--rounds=1", "--clients=2"]
    little.append("--tokens=4")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.load", *little, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["workloads"]
    by_name = {row["workload"]: row for row in rows}
    assert list(by_name) == [one.name for one in (*CLOSED, *OPEN)]
    assert all(not row["failed"] for row in rows)
    assert by_name["base only"]["hit_rate"] is None
    assert by_name["distinct"]["found"]["store"] >= 3, "eight in turn, and room for five"
    assert by_name["distinct"]["cold_load_ms"]["p50"] is not None
    assert all(row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"] for row in rows)
