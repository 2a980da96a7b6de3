"""What an adapter costs where it is served: milliseconds for each token of a request alone, and
what a whole request costs in each of the study's ways (`requests`).

The study's adapters are uploaded to a server of its own and take turns, the base without any among
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from training.errors import TrainingError
from training.methods.files import CONFIG, WEIGHTS
from training.study.arm import Arm
from training.study.config import StudyConfig
from training.study.place import Place
from training.study.requests import cost_of_requests
from training.study.runner import results
from training.study.server import served_name, server

ROUNDS = 5
TOKENS = 64
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
    with server(study) as running:
        client = running.client
        refused = {}
        for arm, folder in chosen.items():
            if (why := _upload(client, served_name(arm), folder)) is not None:
                refused[arm] = why
        arms = [arm for arm in (BASE, *chosen) if arm not in refused]
        least = {(arm, tokens): math.inf for arm in arms for tokens in (1, TOKENS + 1)}
        for arm in arms:
            _ask(client, arm, 1)  # a cold load is no part of a token
        for _ in range(ROUNDS):
            for arm, tokens in least:
                # Whatever else the machine does only adds to a time.
                least[arm, tokens] = min(least[arm, tokens], _ask(client, arm, tokens))
        requests = cost_of_requests(running, study, place, [a for a in chosen if a not in refused])
    times = {arm: least[arm, TOKENS + 1] - least[arm, 1] for arm in arms}
    return {
        "ms_per_token": {arm: round(1000 * seconds / TOKENS, 4) for arm, seconds in times.items()},
        "refused": refused,
        "requests": requests,
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
        parameters["adapter_id"] = served_name(arm)
    started = time.perf_counter()
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    seconds = time.perf_counter() - started
    if reply.is_error:
        raise TrainingError(
            f"the server answered {reply.status_code} for {arm}: {reply.text[:500]}"
        )
    return seconds
