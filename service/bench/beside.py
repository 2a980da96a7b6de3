"""Serving while a job trains beside it: one server over HTTP, its training process stopped and
continued in turns, so that both sorts of rounds meet the same machine."""

from __future__ import annotations

import itertools
import json
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.table import Table

from service.bench.launch import nibble_server
from service.bench.report import percentile

ALONE, BESIDE = "alone", "beside training"
STARTING_SECONDS = 600.0
WORDS = ("the", "old", "king", "finds", "a", "lamp", "in", "his", "garden", "by", "night")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of the server, and of the job."""

    model: Path
    rounds: int
    seconds: float  # of each round
    clients: int
    new_tokens: int
    rank: int
    batch_size: int
    flags: Sequence[str] = ()  # of `nibble serve`


@dataclass(slots=True)
class Times:
    """In seconds, of all requests of one sort of round."""

    first_token: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0  # of training
    seconds: float = 0.0


def measure(setting: Setting, report: Callable[[str, int], None]) -> Figures:
    """p50 and p95 of each time, alone and beside training; `report` hears of each round."""
    found = {ALONE: Times(), BESIDE: Times()}
    with _server(setting) as (url, server), httpx.Client(base_url=url, timeout=600) as client:
        job = _train(client, setting)
        process = _process_of(server)
        _ask(url, setting, 2.0, Times())  # warm
        for number in range(setting.rounds):
            # Every other pair the other way round: none is always the second.
            for sort in (ALONE, BESIDE) if number % 2 == 0 else (BESIDE, ALONE):
                report(sort, number)
                times = found[sort]
                process.send_signal(signal.SIGSTOP if sort == ALONE else signal.SIGCONT)
                before, started = _step(client, job), time.perf_counter()
                _ask(url, setting, setting.seconds, times)
                times.seconds += time.perf_counter() - started
                times.steps += _step(client, job) - before
        process.send_signal(signal.SIGCONT)
        free = _training_alone(client, job, setting.seconds)
        client.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
    return {
        "model": str(setting.model.name),
        "clients": setting.clients,
        "new_tokens": setting.new_tokens,
        **{sort: _figures(times) for sort, times in found.items()},
        "steps_per_second_without_requests": free,
    }


def _figures(times: Times) -> Figures:
    named = {"first_token": times.first_token, "gap": times.gap, "whole": times.whole}
    return {
        "requests": len(times.whole),
        "tokens_per_second": times.tokens / times.seconds,
        "training_steps_per_second": times.steps / times.seconds,
        **{
            f"{name}_p{part}_ms": 1000 * percentile(values, part / 100)
            for name, values in named.items()
            for part in (50, 95)
        },
    }


def beside_table(figures: Figures) -> Table:
    """The figures for people: the last column is what training costs."""
    table = Table("", ALONE, BESIDE, "ratio")
    alone, beside = figures[ALONE], figures[BESIDE]
    for name in alone:
        ratio = f"{beside[name] / alone[name]:.2f}" if alone[name] else "-"
        table.add_row(name, f"{alone[name]:,.1f}", f"{beside[name]:,.1f}", ratio)
    free = figures["steps_per_second_without_requests"]
    table.add_row("training_steps_per_second, no requests", "-", f"{free:,.1f}", "-")
    return table


@contextmanager
def _server(setting: Setting) -> Iterator[tuple[str, psutil.Process]]:
    """`nibble serve` in a home of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="nibble-beside-") as home,
        nibble_server(setting.model, Path(home), setting.flags, {}) as running,
    ):
        yield running.url, psutil.Process(running.pid)


def _train(client: httpx.Client, setting: Setting) -> str:
    """A job that outlasts the measurement, once it takes steps."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=24)) for _ in range(1024)]
    rows = [
        {"prompt": one, "completion": other}
        for one, other in zip(texts[::2], texts[1::2], strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    sent = client.post(
        "/v1/files", files={"file": ("rows.jsonl", text.encode())}, data={"purpose": "fine-tune"}
    )
    body = {
        "model": client.get("/info").json()["model_id"],
        "training_file": sent.raise_for_status().json()["id"],
        "method": {"type": "lora", "lora": {"hyperparameters": {"rank": setting.rank}}},
        "config": {
            "optim": {"steps": 1_000_000, "batch_size": setting.batch_size},
            "checkpoint_every": 1_000_000,
        },
    }
    job = str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
    end = time.monotonic() + STARTING_SECONDS
    while _step(client, job) < 3:
        if time.monotonic() > end:
            raise RuntimeError("the job takes no steps")
        time.sleep(0.2)
    return job


def _step(client: httpx.Client, job: str) -> int:
    found = client.get(f"/v1/fine_tuning/jobs/{job}").raise_for_status().json()
    if found["status"] in ("failed", "cancelled"):
        raise RuntimeError(f"the job {found['status']}: {found['error']}")
    return int(found["progress"]["step"]) if found["progress"] else 0


def _process_of(server: psutil.Process) -> psutil.Process:
    """The process that trains: the only child of a server that checks nothing."""
    (found,) = server.children()
    return found


def _training_alone(client: httpx.Client, job: str, seconds: float) -> float:
    before, started = _step(client, job), time.perf_counter()
    time.sleep(seconds)
    return (_step(client, job) - before) / (time.perf_counter() - started)


def _ask(url: str, setting: Setting, seconds: float, into: Times) -> None:
    """`clients` threads ask one request after another for so long."""
    end = time.perf_counter() + seconds
    lock, numbers = threading.Lock(), itertools.count()

    def ask() -> None:
        draw = random.Random(next(numbers))
        with httpx.Client(base_url=url, timeout=600) as client:
            while time.perf_counter() < end:
                started = time.perf_counter()
                at = _tokens(client, " ".join(draw.choices(WORDS, k=32)), setting.new_tokens)
                with lock:
                    into.first_token.append(at[0] - started)
                    into.gap += [later - sooner for sooner, later in itertools.pairwise(at)]
                    into.whole.append(at[-1] - started)
                    into.tokens += len(at)

    threads = [threading.Thread(target=ask) for _ in range(setting.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _tokens(client: httpx.Client, prompt: str, new_tokens: int) -> list[float]:
    """When each token came."""
    parameters = {"max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"inputs": prompt, "parameters": parameters}
    with client.stream("POST", "/generate_stream", json=body) as reply:
        reply.raise_for_status()
        return [time.perf_counter() for line in reply.iter_lines() if line.startswith("data:")]
