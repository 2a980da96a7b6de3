"""A short load test with a report: `make load`, or `python -m deploy.load --help`."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from deploy.load import report
from deploy.load.adapters import WEIGHTS, names, upload, uploaded
from deploy.load.measure import Phase, Plan, measure
from deploy.load.server import served

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "training" / "samples" / "cipher"
ROOM = 1.05  # a little more than they take
LEAST = 1 << 20  # bytes that a server wants for a tier


def main() -> None:
    given = _arguments()
    headers = (
        {"authorization": f"Bearer {key}"} if (key := os.environ.get("NIBBLE_API_KEY")) else {}
    )
    with ExitStack() as stack:
        room, fit = (None, 0) if given.url else _room(given, headers)
        url = given.url or stack.enter_context(served(room, given.serve))
        http = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=120))
        try:
            info = http.get("/info")
        except httpx.TransportError as error:
            raise SystemExit(f"{url} does not answer ({error}): is `make serve` on?") from error
        if info.is_error:
            raise SystemExit(
                f"{url}/info answers HTTP {info.status_code}: is this a Nibble server?"
            )
        model = info.json()["model_id"]
        told = uploaded(http, given.adapter, given.adapters, _progress)
        adapters = stack.enter_context(told)
        print(file=sys.stderr)
        plan = Plan(
            model=_served_name(http),
            adapters=adapters,
            requests=given.requests,
            clients=given.clients,
            prompt_words=given.prompt_words,
            tokens=given.tokens,
            rounds=given.rounds,
            rate=given.rate,
        )
        phases = asyncio.run(measure(url, plan, headers, _told))
        where = "its own" if given.url is None else "a running one"
        about = {
            "command": shlex.join(["python", "-m", "deploy.load", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "server": f"{info.json()['version']}, {where}; {model}, {info.json()['kernels']}",
            "adapters": f"{given.adapters} of {given.adapter.name}"
            + ("" if room is None else f", {room:,} bytes in each tier: {fit} of them"),
            "load": f"{given.requests} requests a phase and round, {given.rounds} rounds, "
            f"{given.clients} clients; {given.prompt_words + 1} words in, "
            f"{given.tokens} tokens out",
            "SLO": f"first token within {given.ttft_ms:g} ms, then {given.tpot_ms:g} ms a token",
        }
    rows = report.figures(phases, given.ttft_ms / 1000, given.tpot_ms / 1000)
    page = report.write(given.out, phases, rows, about)
    print(page.read_text())
    print(f"written to {page.parent}", file=sys.stderr)
    if any(row["failed"] for row in rows):
        raise SystemExit("some requests failed: see the last column")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.load", description=__doc__)
    add = parser.add_argument
    add("--url", help="a running server; without it one is started, and stopped afterwards")
    add("--serve", type=shlex.split, default=[], help="flags for that one: '--base DIR'")
    add("--adapter", type=Path, default=SAMPLE, help="what all adapters are made of")
    add("--adapters", type=int, default=16, help="how many")
    add(
        "--resident",
        type=int,
        default=4,
        help="fit into each tier of its own server, of 1 MiB at least",
    )
    add("--requests", type=int, default=32, help="of each workload in each round")
    add("--rounds", type=int, default=2)
    add("--clients", type=int, default=4, help="that ask one request after another")
    add("--rate", type=float, help="of Poisson and bursts, requests/s; 0.7 of the base's without")
    add("--prompt-words", type=int, default=24)
    add("--tokens", type=int, default=16, help="of each answer")
    add("--ttft-ms", type=float, default=1000.0, help="SLO for the first token")
    add("--tpot-ms", type=float, default=100.0, help="SLO for each further one, on average")
    add("--out", type=Path, default=ROOT / "build" / "load")
    given = parser.parse_args()
    for name in ("adapters", "resident", "requests", "rounds", "clients", "prompt_words", "tokens"):
        if getattr(given, name) < 1:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {getattr(given, name)}; should be at least 1")
    for name in ("rate", "ttft_ms", "tpot_ms"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; should be more than 0")
    if not (given.adapter / WEIGHTS).is_file():
        parser.error(f"--adapter {given.adapter}: there is no {WEIGHTS}")
    return given


def _room(given: argparse.Namespace, headers: Mapping[str, str]) -> tuple[int, int]:
    """Bytes for `resident` of them, and how many fit. What one takes in memory depends on the
    precision that the server chooses: the first of two servers tells it."""
    with (
        served(None, given.serve) as url,
        httpx.Client(base_url=url, headers=headers, timeout=120) as http,
    ):
        upload(http, given.adapter, 1, _progress)
        loaded = http.post(f"/adapters/{names(1)[0]}/load").raise_for_status().json()
    of_one: int = loaded["bytes"]
    room = max(LEAST, round(ROOM * of_one) * int(given.resident))
    return room, room // of_one


def _served_name(http: httpx.Client) -> str:
    """What OpenAI's clients call the base."""
    models: Sequence[dict[str, str]] = http.get("/v1/models").raise_for_status().json()["data"]
    return models[0]["id"]


def _progress(text: str) -> None:
    print(f"\r{text}", end="", file=sys.stderr, flush=True)


def _told(phase: Phase) -> None:
    failed = sum(bool(reply.fault) for reply in phase.replies)
    said = f"{phase.workload.name}: {phase.rate:.1f} tokens/s, {failed} failed"
    print(f"round {phase.round + 1}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
