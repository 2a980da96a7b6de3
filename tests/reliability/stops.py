"""Servers that have to stop, as processes: SIGTERM again and again under load, and a broken engine.

python -m tests.reliability.stops --times 100
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.reliability.clients import Client, Lost, generate
from tests.reliability.served import Served, scratch, serving

CLIENTS, TOKENS = 8, 24


async def _crowd(
    served: Served, strike: Callable[[], None], after: float
) -> tuple[Counter[str], float]:
    """Clients that ask until nobody listens, and the blow `after` so many seconds. What they heard,
    and how long the door stayed open after it."""
    counted: Counter[str] = Counter()
    struck = [float("inf")]
    ended = [0.0]

    async def one() -> None:
        client = Client(("127.0.0.1", served.port))
        while True:
            sent = time.monotonic()
            try:
                answer = await client.ask(generate("a question", TOKENS))
            except Lost as error:
                # Refused: nobody listens. Else the door closed while it was sent, and that may be
                # lost; what had been sent before the blow may not.
                refused = "ConnectionRefused" in str(error)
                before = sent < struck[0] and not refused
                counted["lost" if before else "refused" if refused else "late"] += 1
                ended[0] = time.monotonic()
                return
            counted[str(answer.status)] += 1
            if answer.status == 200 and b'"generated_text":""' in answer.body.replace(b" ", b""):
                counted["empty"] += 1
            if answer.status == 503:
                await asyncio.sleep(0.05)

    clients = [asyncio.ensure_future(one()) for _ in range(CLIENTS)]
    await asyncio.sleep(after)
    struck[0] = time.monotonic()
    strike()
    await asyncio.gather(*clients)
    return counted, ended[0] - struck[0]


def terminated(work: Path, base: str, after: float) -> Counter[str]:
    """One life: what its clients heard, and its exit status."""
    with serving(work, "--base", base, "--kv-cache-bytes", "8MiB") as served:
        counted, _ = asyncio.run(_crowd(served, served.process.terminate, after))
        counted[f"exit {served.process.wait(60)}"] += 1
    return counted


def broken(work: Path, base: str) -> tuple[Counter[str], float]:
    """One life that ends with its engine, and how long that took."""
    with serving(work, "--base", base, "--kv-cache-bytes", "8MiB") as served:
        counted, seconds = asyncio.run(_crowd(served, served.break_engine, 0.5))
        counted[f"exit {served.process.wait(60)}"] += 1
    return counted, seconds


def wrong_with(counted: Counter[str], status: int, allowed: set[str]) -> list[str]:
    strange = set(counted) - allowed - {f"exit {status}"}
    return [f"{what}: {counted[what]}" for what in sorted(strange)]


TERMINATED = {"200", "503", "refused", "late"}
BROKEN = TERMINATED | {"500"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    asked = parser.parse_args()
    chance, total, wrong, began = Random(7), Counter[str](), [], time.monotonic()
    with scratch() as (work, base):
        counted, seconds = broken(work / "run", base)
        wrong += wrong_with(counted, 1, BROKEN)
        print(f"a broken engine: {dict(counted)}, gone after {seconds:.1f} s", flush=True)
        for number in range(asked.times):
            if time.monotonic() - began > asked.seconds:
                break
            found = terminated(work / "run", base, 0.2 + chance.random())
            wrong += wrong_with(found, 0, TERMINATED)
            total += found
            print(f"SIGTERM {number + 1}: {dict(total)}", flush=True)
    print("\n".join(wrong) or "nothing lost")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
