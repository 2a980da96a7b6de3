"""Growth: what a token costs a server while more and more adapters are registered.

`nibble serve` over homes with 1, 10, 100 and 1,000 adapters, and one more over a home with 1: what
that differs by from the first is what the measurement cannot tell apart. All are alive at once and
asked the same requests in turns; then all start anew, since two processes that do the same may
differ for as long as they live.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from service.bench.launch import ANSWER_SECONDS, Running, ServerFailed, nibble_server
from service.bench.scenario import Job, Scenario, job
from service.bench.turns import Cost, Figures, Try, beside, in_turns

STARTS = 3  # of every server


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of one turn, all at once to one adapter by its name."""

    adapter: str
    vocabulary: int
    clients: int = 8
    prompt_tokens: int = 16
    new_tokens: int = 16

    @property
    def tokens(self) -> int:
        return self.clients * self.new_tokens

    def job(self, number: int) -> Job:
        """No two turns share a prompt, or the prefix cache would answer."""
        requests = Scenario("growth", (0,) * self.clients)
        return job(requests, number, self.vocabulary, self.prompt_tokens, self.new_tokens)


def measure_growth(
    model: Path,
    homes: Sequence[tuple[int, Path]],
    flags: Sequence[str],
    environment: Mapping[str, str],
    asked: Asked,
    rounds: int,
) -> list[Figures]:
    """A row for each home and how many are registered in it; each beside the first. `rounds` are
    those of each of `STARTS`."""
    costs: list[list[Cost]] = [[] for _ in homes]
    for _ in range(STARTS):
        with ExitStack() as stack:
            servers = [
                stack.enter_context(nibble_server(model, home, flags, environment))
                for _, home in homes
            ]
            taken = in_turns([_asking(server, asked) for server in servers], rounds)
        for mine, more in zip(costs, taken, strict=True):
            mine += more
    return [
        {
            "registered": count,
            "token_ms": round(1000 * statistics.median(c.wall for c in mine) / asked.tokens / 2, 3),
            "cpu_ms": round(1000 * statistics.median(c.cpu for c in mine) / asked.tokens / 2, 3),
            "rounds": len(mine),
            **beside(mine, costs[0]),
        }
        for (count, _), mine in zip(homes, costs, strict=True)
    ]


def _asking(server: Running, asked: Asked) -> Try:
    """Answers come whole: a client that reads every token takes time from the server."""

    def ask(number: int) -> Cost:
        prompts = asked.job(number).prompts
        with ThreadPoolExecutor(len(prompts)) as clients:
            wall, cpu = time.perf_counter(), processor_seconds(server.pid)
            answers = [clients.submit(_complete, server.url, asked, prompt) for prompt in prompts]
            for one in answers:
                one.result()
            wall, cpu = time.perf_counter() - wall, processor_seconds(server.pid) - cpu
        return Cost(wall, cpu)

    return ask


def _complete(url: str, asked: Asked, prompt: Sequence[int]) -> None:
    body = {
        "model": asked.adapter,
        "prompt": prompt,
        "max_tokens": asked.new_tokens,
        "min_tokens": asked.new_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    head = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
    with urlopen(request, timeout=ANSWER_SECONDS) as reply:
        count = json.load(reply)["usage"]["completion_tokens"]
    if count != asked.new_tokens:
        raise ServerFailed(f"{count} tokens came, {asked.new_tokens} were asked for")


def processor_seconds(pid: int) -> float:
    """Of all threads of a process, those that ended too, in nanoseconds (Linux).

    The clock's number is that of clock_getcpuclockid(3), which Python does not have.
    """
    return time.clock_gettime((~pid << 3) | 2)
