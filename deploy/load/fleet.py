"""What `nibble plan fleet` foretells, held against servers that run: the same arrivals, sent and
simulated.

    nibble bench --threads 1 --no-peft --no-transformers --no-llama --json bench.json
    python -m deploy.load.fleet bench.json --replicas 2

Each server has one core and one thread, so that two of them are two machines as far as their steps
go, and the bench has to be of one thread too. Adapters are in their slots before the clock starts.
The servers' processor time stands beside the simulated time of all steps: it is what they took also
where other work made them wait, and beyond the steps it is HTTP's and the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from deploy.load.client import Reply, ask
from deploy.load.server import served
from service.bench.cli import directory_of
from service.bench.scenario import DISTINCT
from service.plan.calibration import Calibration, UnusableBench, calibrate
from service.plan.fleet import percentile
from service.plan.rendezvous import rendezvous
from service.plan.simulation import Measured, Request, Server, Traffic, arrivals, replay

LOAD = 0.6  # of what the replicas bear
RANK = 16  # as in the bench
ROOM = 2 << 30
PATIENCE = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: as it was measured, as it was foretold."""

    name: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def main() -> None:
    given = _arguments()
    try:
        figures = json.loads(given.bench.read_text(encoding="utf-8"))
        known = calibrate(figures)
    except (UnusableBench, OSError, ValueError) as error:
        raise SystemExit(f"{given.bench}: {error}") from error
    if figures["threads"] != 1:
        raise SystemExit(
            f"{given.bench} is of {figures['threads']} threads; the servers here have one each: "
            "run `nibble bench --threads 1 --json FILE`"
        )
    given.base = str(directory_of(given.base or known.model, None))
    if given.rate is None:
        given.rate = LOAD * given.replicas * _bearable(figures, known, given.new_tokens)
    traffic = Traffic(given.rate, given.adapters, given.zipf, given.prompt_tokens, given.new_tokens)
    due = arrivals(traffic, given.requests, given.seed)
    server = Server(known.cost, known.kv_cache_bytes // known.token_bytes, given.adapters, 0.0)
    simulated = replay([replace(each) for each in due], server, given.replicas, "rendezvous")
    load = os.getloadavg()[0]
    replies, spent, own = _run(given, due)
    rows = compared(due, replies, simulated)
    rows.append(Row("servers' processor time (s)", spent, simulated.busy))
    about = {
        "traffic": asdict(traffic),
        "replicas": given.replicas,
        "requests": given.requests,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "client_seconds": own,
        "calibration": asdict(known),
    }
    _print(rows, known, about)
    if given.json:
        found = [{**asdict(row), "error": row.error} for row in rows]
        given.json.write_text(json.dumps({**about, "rows": found}, indent=2) + "\n")


def _bearable(figures: Mapping[str, Any], known: Calibration, new_tokens: int) -> float:
    """Requests/s of one replica that always has eight, each with an adapter of its own."""
    rates = {
        row["scenario"]: row["tokens_per_second"]
        for row in figures["results"]
        if row["peer"] == known.peer
    }
    return float(rates[DISTINCT.name]) / new_tokens


def _run(given: argparse.Namespace, due: Sequence[Request]) -> tuple[list[Reply], float, float]:
    """What came back, and the processor time for it, the servers' and our own, in seconds."""
    flags = ["--base", given.base, "--drain-seconds", "5"]
    with ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        urls = [
            stack.enter_context(served(ROOM, flags, cores[number % len(cores)], 1))
            for number in range(given.replicas)
        ]
        servers = psutil.Process().children()
        names, vocabulary = put_adapters(urls, given.base, given.adapters)
        return asyncio.run(_send(urls, names, due, vocabulary, servers))


def put_adapters(urls: Sequence[str], base: str, count: int) -> tuple[list[str], int]:
    """LoRAs like those of the bench, on every server; and the base's vocabulary."""
    import torch

    from base.load import load_base
    from service.bench.random_adapters import random_adapter

    spec = load_base(base, lean=True).spec
    names = [f"load-{number:04}" for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="nibble-load-") as scratch:
        for number, name in enumerate(names):
            chance = torch.Generator().manual_seed(number)
            made = random_adapter(Path(scratch) / name, spec, RANK, chance)
            files = {
                "config": (made / "adapter_config.json").read_bytes(),
                "weights": (made / "adapter_model.safetensors").read_bytes(),
            }
            for url in urls:
                reply = httpx.post(f"{url}/adapters", data={"name": name}, files=files, timeout=600)
                reply.raise_for_status()
    return names, spec.vocab_size


async def _send(
    urls: Sequence[str],
    names: Sequence[str],
    due: Sequence[Request],
    vocabulary: int,
    servers: Sequence[psutil.Process],
) -> tuple[list[Reply], float, float]:
    homes = [rendezvous(each.adapter, range(len(urls)))[0] for each in due]
    unbounded = httpx.Limits(max_connections=None)
    async with AsyncExitStack() as stack:
        https = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=unbounded)
            )
            for url in urls
        ]
        for number, each in enumerate(due):  # every adapter that is asked for, to its slot
            if each.adapter not in {earlier.adapter for earlier in due[:number]}:
                warm = prompt(f"warm {number}", 8, vocabulary)
                await ask(https[homes[number]], "", names[each.adapter], warm, 2, 0.0)
        begun, before, own = time.perf_counter() + 0.5, _spent(servers), time.process_time()

        async def one(number: int, each: Request) -> Reply:
            when = begun + each.arrived
            await asyncio.sleep(max(when - time.perf_counter(), 0))
            ids = prompt(number, each.prompt, vocabulary)
            return await ask(https[homes[number]], "", names[each.adapter], ids, each.left, when)

        replies = await asyncio.gather(*(one(n, each) for n, each in enumerate(due)))
        return list(replies), _spent(servers) - before, time.process_time() - own


def _spent(servers: Sequence[psutil.Process]) -> float:
    times = [each.cpu_times() for each in servers]
    return sum(each.user + each.system for each in times)


def prompt(seed: object, tokens: int, vocabulary: int) -> list[int]:
    """No two begin alike: a prefix cache would answer."""
    chance = random.Random(str(seed))
    return [chance.randrange(min(16, vocabulary // 2), vocabulary) for _ in range(tokens)]


def compared(due: Sequence[Request], replies: Sequence[Reply], simulated: Measured) -> list[Row]:
    """Of the requests that count. Raises SystemExit where one failed."""
    if faults := sorted({reply.fault for reply in replies if reply.fault}):
        raise SystemExit(f"some requests failed: {', '.join(faults)}")
    counted = [(each, reply) for each, reply in zip(due, replies, strict=True) if each.counted]
    first = np.array([reply.first for _, reply in counted])
    whole = np.array([reply.last for _, reply in counted])
    begun = counted[0][0].arrived
    ended = max(each.arrived + reply.last for each, reply in counted)
    tokens = sum(reply.tokens for _, reply in counted)
    rows = [
        Row(
            "tokens/s",
            float(tokens / (ended - begun)),
            float(simulated.tokens / (simulated.end - begun)),
        )
    ]
    for name, mine, theirs in (
        ("first token", first, simulated.first),
        ("whole reply", whole, simulated.whole),
    ):
        for part in (50, 90, 99):
            found = (float(np.percentile(each, part)) for each in (mine, theirs))
            rows.append(Row(f"{name} p{part} (s)", *found))
    gaps = [gap for _, reply in counted for gap in reply.gaps]
    for part in (50, 90, 99):
        told = percentile(simulated.gaps, part / 100)
        rows.append(Row(f"between tokens p{part} (s)", float(np.percentile(gaps, part)), told))
    return rows


def _print(rows: Sequence[Row], known: Calibration, about: dict[str, Any]) -> None:
    busy = " to ".join(str(each) for each in about["load_average"])
    print(
        f"{known.model}, {about['replicas']} replicas of one thread, {about['requests']} requests, "
        f"{about['traffic']}; load average {busy}; this client's processor time "
        f"{about['client_seconds']:.3g} s\n"
    )
    print("| | measured | simulated | error |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.measured:.3g} | {row.simulated:.3g} | {row.error:+.0%} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.load.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bench", type=Path, help="what `nibble bench --threads 1 --json` wrote")
    add("--base", help="where that model is now, if it is not where the bench had it")
    add("--replicas", type=int, default=2)
    add("--rate", type=float, help="requests/s, in all; without it six tenths of what they bear")
    add("--requests", type=int, default=200)
    add("--adapters", type=int, default=8)
    add("--zipf", type=float, default=1.0)
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the figures to this file too")
    given = parser.parse_args()
    for name in ("replicas", "rate", "requests", "adapters", "prompt_tokens", "new_tokens"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} should be more than 0")
    if given.new_tokens < 2:
        parser.error("--new-tokens should be at least 2")
    return given


if __name__ == "__main__":
    main()
