"""What an adapter costs where it is served: milliseconds for each token of a request alone.

A server of its own is started on the command line, so that the wings stay apart; the study's
adapters are uploaded and take turns, the base without any among them.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from base.mini import MINI
from training.errors import TrainingError
from training.methods.files import CONFIG, WEIGHTS
from training.study.arm import Arm, Place
from training.study.config import StudyConfig
from training.study.runner import results

ROUNDS = 5
TOKENS = 64
PATIENCE = 300.0  # seconds for the server to come up
BASE = "base"
PROMPT = "Once there was a small town by the river."


def measure(study: StudyConfig, place: Place) -> dict[str, Any]:
    """`ms_per_token` by the arm's id, and "base"; `refused` says which uploads were, and why.

    One adapter of each method and task is timed, the first seed's. Raises TrainingError where
    there is none, or no server comes up.
    """
    chosen = _chosen(study, place)
    if not chosen:
        raise TrainingError(f"{place.root}: no adapter is kept there that could be timed")
    with _server(study) as client:
        refused = {}
        for arm, folder in chosen.items():
            if (why := _upload(client, _served_name(arm), folder)) is not None:
                refused[arm] = why
        arms = [arm for arm in (BASE, *chosen) if arm not in refused]
        least = {(arm, tokens): math.inf for arm in arms for tokens in (1, TOKENS + 1)}
        for arm in arms:
            _ask(client, arm, 1)  # a cold load is no part of a token
        for _ in range(ROUNDS):
            for arm, tokens in least:
                # Whatever else the machine does only adds to a time.
                least[arm, tokens] = min(least[arm, tokens], _ask(client, arm, tokens))
    times = {arm: least[arm, TOKENS + 1] - least[arm, 1] for arm in arms}
    return {
        "ms_per_token": {arm: round(1000 * seconds / TOKENS, 4) for arm, seconds in times.items()},
        "refused": refused,
        "tokens": TOKENS,
        "rounds": ROUNDS,
    }


def _chosen(study: StudyConfig, place: Place) -> dict[str, Path]:
    """Arm's id -> where its adapter is."""
    found: dict[str, Path] = {}
    for name, result in results(place).items():
        given: Mapping[str, Any] = result["arm"]
        arm = Arm(*(given[key] for key in ("kind", "task", "name", "learning_rate", "seed")))
        folder = place.adapter(arm.task, arm.name, arm.learning_rate, arm.seed)
        if arm.kind == "final" and arm.seed == study.seeds[0] and (folder / WEIGHTS).is_file():
            found[name] = folder
    return found


def _served_name(arm: str) -> str:
    """Names of adapters have no dots."""
    return arm.replace(".", "-").replace("+", "-").replace("_", "-")


def _upload(client: httpx.Client, name: str, folder: Path) -> str | None:
    """None, or why the server refused it."""
    with ExitStack() as stack:
        files = {
            part: stack.enter_context((folder / file).open("rb"))
            for part, file in (("config", CONFIG), ("weights", WEIGHTS))
        }
        reply = client.post("/adapters", data={"name": name}, files=files)
    return None if reply.is_success else reply.text[:500]


def _ask(client: httpx.Client, arm: str, tokens: int) -> float:
    """Seconds of one request. The prompt is known after the first, so what two lengths differ in
    is the tokens that were made."""
    parameters: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}
    if arm != BASE:
        parameters["adapter_id"] = _served_name(arm)
    started = time.perf_counter()
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    seconds = time.perf_counter() - started
    if reply.is_error:
        raise TrainingError(
            f"the server answered {reply.status_code} for {arm}: {reply.text[:500]}"
        )
    return seconds


@contextmanager
def _server(study: StudyConfig) -> Iterator[httpx.Client]:
    """A running server without samples, on a free port, with a store that is thrown away."""
    nibble = Path(sys.executable).with_name("nibble")
    if not nibble.is_file():
        raise TrainingError(f"{nibble} is not there: serving is timed with the installed package")
    base = str(MINI) if study.base == "mini" else study.base
    with tempfile.TemporaryDirectory(prefix="nibble-study-") as home:
        port, log = _free_port(), Path(home) / "serve.log"
        command = [str(nibble), "serve", "--base", base, "--port", str(port), "--home", home]
        environment = {**os.environ, "OMP_NUM_THREADS": str(study.threads)}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as client:
                _wait(client, process, log)
                yield client
        finally:
            process.terminate()
            process.wait(60)


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise TrainingError(f"no server came up to time the adapters on:\n{said}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
