"""What a second replica brings, and what Ray costs: tokens/s in turn of a server that is asked
directly, of one replica behind Ray, and of two.

    python -m deploy.load.replicas --base DIR

Each has one thread, so on two cores the second replica competes with Ray's own processes and with
this client. One replica is asked by naming only adapters that it is the home of.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from deploy.load.client import ask
from deploy.load.fleet import PATIENCE, ROOM, prompt, put_adapters
from deploy.load.measure import scrape
from deploy.load.server import served
from service.bench.cli import directory_of

GENERATED = ("vllm:generation_tokens_total", "")
STARTING = 600.0
IDLE_SECONDS = 5.0
Arm = tuple[str, Sequence[str], psutil.Process]  # a URL, the adapters to ask for, what runs it


@dataclass(frozen=True, slots=True)
class Round:
    """What one arm did in one round."""

    rate: float  # tokens/s
    milliseconds: float  # of processor time, for each token


def main() -> None:
    given = _arguments()
    given.base = str(directory_of(given.base, None))
    with ExitStack() as stack:
        direct = stack.enter_context(served(ROOM, ["--base", given.base], threads=1))
        ray = stack.enter_context(_ray(given))
        names, vocabulary = put_adapters([direct, ray], given.base, given.adapters)
        homes = asyncio.run(_homes(ray, given.metrics_port, names))
        ours = [name for name in names if homes[name] == 0]
        if not 0 < len(ours) < len(names):
            raise SystemExit(f"all {len(names)} adapters have one home: ask for more")
        server, cluster = psutil.Process().children()  # in the order of their starts
        arms = {
            "direct": (direct, ours, server),
            "Ray, one": (ray, ours, cluster),
            "Ray, two": (ray, names, cluster),
        }
        idle = _idle(cluster)
        load = os.getloadavg()[0]
        found = asyncio.run(_rounds(arms, given, vocabulary))
    print(
        f"{given.base}, {given.clients} clients, {given.requests} requests a round, {given.rounds} "
        f"rounds, {given.tokens} tokens out; homes {len(ours)} and {len(names) - len(ours)}; load "
        f"average {load:.1f} to {os.getloadavg()[0]:.1f}; Ray takes {idle:.2f} s of processor time "
        "a second when nothing is asked\n"
    )
    print(
        table("tokens/s", {name: [each.rate for each in rounds] for name, rounds in found.items()})
    )
    print()
    spent = {name: [each.milliseconds for each in rounds] for name, rounds in found.items()}
    print(table("ms of processor time a token", spent))


def table(what: str, figures: Mapping[str, Sequence[float]]) -> str:
    """Each arm beside the one before it, round by round."""
    lines = [f"| | {what}, median | of the one before it, by rounds |", "|---|---|---|"]
    before: Sequence[float] = ()
    for name, found in figures.items():
        ratios = sorted(b / a for a, b in zip(before, found, strict=False))
        told = (
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            if ratios
            else ""
        )
        lines.append(f"| {name} | {statistics.median(found):.1f} | {told} |")
        before = found
    return "\n".join(lines)


def _spent(tree: psutil.Process) -> float:
    """Seconds of processor time of a process and all below it."""
    times = [each.cpu_times() for each in (tree, *tree.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _idle(tree: psutil.Process) -> float:
    begun, before = time.perf_counter(), _spent(tree)
    time.sleep(IDLE_SECONDS)
    return (_spent(tree) - before) / (time.perf_counter() - begun)


async def _rounds(
    arms: dict[str, Arm], given: argparse.Namespace, vocabulary: int
) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {name: [] for name in arms}
    for number in range(given.rounds + 1):  # the first warms up
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            each = await _round(arms[name], given, vocabulary, f"{number} {name}")
            if number:
                found[name].append(each)
    return found


async def _round(arm: Arm, given: argparse.Namespace, vocabulary: int, seed: str) -> Round:
    url, names, tree = arm
    left = iter(range(given.requests))
    done = 0
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:

        async def client() -> None:
            nonlocal done
            for number in left:
                ids = prompt(f"{seed} {number}", given.prompt_tokens, vocabulary)
                name = names[number % len(names)]
                reply = await ask(http, "", name, ids, given.tokens, time.perf_counter())
                if reply.fault:
                    raise SystemExit(f"{url}, {name}: {reply.fault}")
                done += reply.tokens

        begun, before = time.perf_counter(), _spent(tree)
        await asyncio.gather(*(client() for _ in range(given.clients)))
        seconds = time.perf_counter() - begun
        return Round(done / seconds, 1000 * (_spent(tree) - before) / done)


async def _homes(url: str, port: int, names: Sequence[str]) -> dict[str, int]:
    """Which replica an adapter is at: the one whose count goes up."""
    found = {}
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        at = [
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port + number}", timeout=PATIENCE)
            for number in range(2)
        ]
        http.base_url = httpx.URL(url)
        for name in names:
            before = [(await scrape(each))[GENERATED] for each in at]
            await ask(http, "", name, [20, 21, 22], 2, 0.0)
            after = [(await scrape(each))[GENERATED] for each in at]
            found[name] = 0 if after[0] > before[0] else 1
        for each in at:
            await each.aclose()
    return found


@contextmanager
def _ray(given: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="nibble-load-") as home:
        log = Path(home) / "log"
        command = [sys.executable, "-m", "deploy.ray", "--replicas", "2", "--home", home]
        command += ["--port", str(given.port), "--metrics-port", str(given.metrics_port)]
        command += ["--base", given.base, "--adapters", "none"]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            end = time.monotonic() + STARTING
            while "serving on" not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"Ray did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{given.port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.load.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", default="mini", help="as the bench's --model")
    add("--adapters", type=int, default=16)
    add("--clients", type=int, default=16)
    add("--requests", type=int, default=64, help="of each in each round")
    add("--rounds", type=int, default=5)
    add("--prompt-tokens", type=int, default=64)
    add("--tokens", type=int, default=32)
    add("--port", type=int, default=8790)
    add("--metrics-port", type=int, default=8795)
    return parser.parse_args()


if __name__ == "__main__":
    main()
