"""Servers over HTTP, asked by one client: `nibble serve`, and llama.cpp's own `llama-server`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from service.bench.gguf_files import write_base, write_lora
from service.bench.isa import server_system
from service.bench.launch import (
    Running,
    ServerFailed,
    free_port,
    launched,
    nibble_server,
    token_times,
)
from service.bench.llama_peer import sets_of
from service.bench.peer import Setup
from service.bench.scenario import Job, Round, round_of
from service.client import Client

OVER_HTTP = "over HTTP"
SLOTS = 8  # sequences that llama-server computes at once
CONTEXT = 8 * 1024  # tokens of all of them
Body = dict[str, Any]


class NibbleServerPeer:
    """`nibble serve` as people start it; the adapters are uploaded, and asked for by name."""

    def __init__(self, setup: Setup) -> None:
        self._stack = ExitStack()
        home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nibble-bench-")))
        flags = ["--precision", str(setup.options["precision"])]
        self._server = self._stack.enter_context(
            nibble_server(setup.model, home, flags, _threads(setup))
        )
        try:
            with Client(self._server.url) as client:
                for number, directory in enumerate(setup.adapters):
                    client.push(directory, f"bench-{number}")
        except Exception:
            self._stack.close()
            raise

    def run(self, job: Job, way: str) -> Round:
        assert way == OVER_HTTP, way
        return ask_completions(self._server.url, job)

    def facts(self) -> dict[str, Any]:
        with Client(self._server.url) as client:
            kernels = client.info()["kernels"]
        return {"kernels": kernels, "started_seconds": round(self._server.seconds, 2)}

    def close(self) -> None:
        self._stack.close()


class LlamaServerPeer:
    """llama.cpp's server with every LoRA loaded and none applied: a request scales its own to 1.

    `options`: the program (`binary`), and those of `llama_peer.LlamaPeer`.
    """

    def __init__(self, setup: Setup) -> None:
        self._stack = ExitStack()
        scratch = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nibble-gguf-"))
        )
        self._system = server_system(Path(setup.options["binary"]))
        try:
            self._server = self._start(setup, scratch)
        except Exception:
            self._stack.close()
            raise

    def run(self, job: Job, way: str) -> Round:
        assert way == OVER_HTTP, way
        return ask_all(self._server.url, "/completion", job, self._body, _llama_tokens)

    def facts(self) -> dict[str, Any]:
        return {
            "dtype": "Q4_0, head and embeddings as llama.cpp chooses",
            "kernels": ", ".join(sets_of(self._system)),
            "started_seconds": round(self._server.seconds, 2),
        }

    def close(self) -> None:
        self._stack.close()

    def _start(self, setup: Setup, scratch: Path) -> Running:
        options = setup.options
        base = write_base(setup.model, Path(options["gguf"]), setup.threads)
        loras = [
            str(write_lora(directory, options["architecture"], scratch / f"{number}.gguf"))
            for number, directory in enumerate(setup.adapters)
        ]
        url = f"http://127.0.0.1:{free_port()}"
        command = llama_command(str(options["binary"]), base, loras, url, setup.threads)
        return self._stack.enter_context(
            launched(command, scratch / "log", lambda _: url, "/health")
        )

    def _body(self, prompt: tuple[int, ...], adapter: int | None, new: int) -> Body:
        return {
            "prompt": prompt,
            "n_predict": new,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
            "stream": True,
            "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}],
        }


def llama_command(binary: str, base: Path, loras: list[str], url: str, threads: int) -> list[str]:
    """How llama-server is started."""
    port = url.rpartition(":")[2]
    command = [binary, "--model", str(base), "--host", "127.0.0.1", "--port", port]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    command += ["--parallel", str(SLOTS), "--ctx-size", str(CONTEXT), "--cache-ram", "0"]
    if loras:
        command += ["--lora", ",".join(loras), "--lora-init-without-apply"]
    return command


def ask_completions(url: str, job: Job) -> Round:
    """The job as OpenAI's completions; adapter i was uploaded as bench-i."""

    def body(prompt: tuple[int, ...], adapter: int | None, new: int) -> Body:
        return {
            "model": "base" if adapter is None else f"bench-{adapter}",
            "prompt": prompt,
            "max_tokens": new,
            "min_tokens": new,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }

    return ask_all(url, "/v1/completions", job, body, _nibble_tokens)


def ask_all(
    url: str,
    path: str,
    job: Job,
    body: Callable[[tuple[int, ...], int | None, int], Body],
    tokens: Callable[[Any], int],
) -> Round:
    """All requests of the job at once, a thread each."""
    bodies = [
        body(prompt, adapter, job.new_tokens)
        for prompt, adapter in zip(job.prompts, job.scenario.adapters, strict=True)
    ]
    with ThreadPoolExecutor(len(bodies)) as clients:
        arrival = time.perf_counter()
        asked = [clients.submit(token_times, url, path, each, tokens) for each in bodies]
        times = [one.result() for one in asked]
    if any(len(each) != job.new_tokens for each in times):
        counts = [len(each) for each in times]
        raise ServerFailed(f"{path} gave {counts} tokens, {job.new_tokens} for each were asked for")
    return round_of(arrival, times)


def _nibble_tokens(event: Mapping[str, Any]) -> int:
    """Of one chunk: each but the last, which only says why it ended, is a token."""
    return sum(choice["finish_reason"] is None for choice in event["choices"])


def _llama_tokens(event: Mapping[str, Any]) -> int:
    return len(event["tokens"])


def _threads(setup: Setup) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(setup.threads)}
