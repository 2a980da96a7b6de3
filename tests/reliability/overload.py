"""Ten times more requests than a server can serve: what those hear that it takes, and the others.

    python -m tests.reliability.overload --rounds 4

At capacity: as many clients as have a place, each with its next request at the answer to the one
before, so that the queue is about as long as it may be. (Now and then one comes before the place of
the one that ended is free, and asks again.) Overloaded: ten times the rate that came of that,
whether answers come or not. The two take turns. What was admitted must not take longer for the
refusals beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine
from statistics import median
from typing import Any

import uvloop

from tests.reliability.clients import Load, closed_loop, evenly, generate, open_loop, quantile
from tests.reliability.host import Host
from tests.reliability.served import Served, scratch, serving

RUNNING, QUEUE, TIMES = 8, 8, 10
FLAGS = (
    *("--max-num-seqs", str(RUNNING), "--max-queue", str(QUEUE)),
    *("--kv-cache-bytes", "16MiB"),
)


def measure(
    served: Served, tokens: int, seconds: float, host: Host | None = None
) -> tuple[Load, Load, float]:
    """At capacity, overloaded, and the CPU time of a refusal in the event loop."""
    address, content = ("127.0.0.1", served.port), generate("a question", tokens)

    def once(load: Callable[[], Coroutine[Any, Any, Load]]) -> tuple[Load, float]:
        before = served.loop_seconds()
        return uvloop.run(load()), served.loop_seconds() - before

    host = host or Host(0)
    full, at_capacity = host.quiet(
        lambda: once(lambda: closed_loop(address, content, RUNNING + QUEUE, seconds))
    )
    moments = evenly(TIMES * len(full.times(200)) / seconds, seconds)
    over, spent = host.quiet(lambda: once(lambda: open_loop(address, content, moments, seconds)))
    # What the admitted ones cost is known from before.
    own = at_capacity / max(1, len(full.times(200))) * len(over.times(200))
    return full, over, max(0.0, spent - own) / max(1, len(over.times(503)))


def wrong_with(full: Load, over: Load) -> list[str]:
    """What is neither an answer nor a refusal as it should be."""
    found = []
    if not set(full.statuses) <= {200, 503} or len(full.times(503)) > len(full.times(200)) / 4:
        found.append(f"at capacity: {dict(full.statuses)}")
    if not set(over.statuses) <= {200, 503} or over.lost or full.lost:
        found.append(f"overloaded: {dict(over.statuses)} {dict(over.lost + full.lost)}")
    if any("retry-after" not in one.headers for one in over.answers if one.status == 503):
        found.append("a refusal without Retry-After")
    return found


def told(name: str, load: Load, status: int) -> str:
    times = load.times(status)
    p50, p99 = (1e3 * quantile(times, share) for share in (0.5, 0.99))
    return (
        f"{name} {len(times)} ({len(times) / load.seconds:.0f}/s), p50 {p50:.0f}, p99 {p99:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=8, help="where the host disturbed")
    parser.add_argument("--base", help="directory or name of a model; default: a tiny random one")
    asked = parser.parse_args()
    ratios, refusals, wrong, host = [], [], [], Host(asked.repeats)
    with (
        scratch(asked.base) as (work, base),
        serving(work / "run", "--base", base, *FLAGS) as served,
    ):
        measure(served, 8, 2)
        for _ in range(asked.rounds):
            full, over, cost = measure(served, asked.tokens, asked.seconds, host)
            wrong += wrong_with(full, over)
            ratios.append(quantile(over.times(200), 0.99) / quantile(full.times(200), 0.99))
            refusals += over.times(503)
            print(told("at capacity", full, 200), told("; admitted", over, 200), sep="")
            print(
                f"  {told('refused', over, 503)}, {1e3 * cost:.2f} ms of CPU each; admitted "
                f"p99 over that at capacity {ratios[-1]:.2f}"
            )
    print(f"admitted p99 over at capacity: {median(ratios):.2f}, {min(ratios):.2f} to", end=" ")
    print(f"{max(ratios):.2f}; refusals p50 {1e3 * quantile(refusals, 0.5):.1f} ms", end=", ")
    print(f"p99 {1e3 * quantile(refusals, 0.99):.1f} ms; {host}", *wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
