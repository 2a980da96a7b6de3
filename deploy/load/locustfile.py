"""Soak, for hours: `locust -f deploy/load/locustfile.py --headless -u 16 -t 8h --host URL`.

Traffic by Zipf's law over the adapters that `python -m deploy.load.adapters` uploaded, with churn
beside it: uploads, deletions, clients that go in the middle of a stream. Whoever runs it watches
the server's memory and descriptors; any failure here makes locust end with 1.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, between, events, task

SAMPLE = Path(os.environ.get("LOAD_ADAPTER", "training/samples/cipher"))
MODEL = os.environ.get("LOAD_MODEL", "mini")
KEY = os.environ.get("NIBBLE_API_KEY")
HEADERS = {"authorization": f"Bearer {KEY}"} if KEY else {}
_uploads = itertools.count()


def report(name: str, seconds: float) -> None:
    """A time of our own beside locust's: it knows nothing of tokens."""
    events.request.fire(
        request_type="TOKEN",
        name=name,
        response_time=1000 * seconds,
        response_length=0,
        exception=None,
        context={},
    )


class Generating(HttpUser):
    """Asks for completions, most of them from few adapters."""

    wait_time = between(0.0, 0.5)

    def on_start(self) -> None:
        found = self.client.get("/v1/models", headers=HEADERS).json()["data"]
        self.adapters = [one["id"] for one in found if one["id"].startswith("load-")] or [MODEL]
        self.weights = [1 / place for place in range(1, len(self.adapters) + 1)]

    def body(self, **more: Any) -> dict[str, Any]:
        (model,) = random.choices(self.adapters, self.weights)
        prompt = f"{random.random()} once upon a time"
        return {"model": model, "prompt": prompt, "max_tokens": 16, **more}

    @task(3)
    def whole(self) -> None:
        self.client.post("/v1/completions", json=self.body(), headers=HEADERS)

    @task(6)
    def streamed(self) -> None:
        begun = before = time.perf_counter()
        body = self.body(stream=True)
        with self.client.post(
            "/v1/completions",
            json=body,
            headers=HEADERS,
            stream=True,
            catch_response=True,
            name="/v1/completions (stream)",
        ) as response:
            ended = False
            for line in response.iter_lines(chunk_size=None):
                text = line.decode()
                if text.startswith("data: {"):
                    if "error" in json.loads(text[6:]):
                        response.failure("error in the stream")
                        return
                    now = time.perf_counter()
                    report("first token" if before == begun else "next token", now - before)
                    before = now
                ended = ended or text == "data: [DONE]"
            if not ended:
                response.failure("the stream broke off")

    @task(1)
    def leaving(self) -> None:
        body = self.body(stream=True, max_tokens=64)
        with self.client.post(
            "/v1/completions",
            json=body,
            headers=HEADERS,
            stream=True,
            catch_response=True,
            name="/v1/completions (left)",
        ) as response:
            next(response.iter_lines(chunk_size=None), None)
            response.close()


class Publishing(HttpUser):
    """Uploads an adapter, uses it, and removes it."""

    fixed_count = 1  # by weight there would be none among few
    wait_time = between(5.0, 15.0)

    @task
    def churn(self) -> None:
        name = f"soak-{os.getpid()}-{next(_uploads)}"
        files = {
            part: (path.name, path.read_bytes(), "application/octet-stream")
            for part, path in (
                ("config", SAMPLE / "adapter_config.json"),
                ("weights", SAMPLE / "adapter_model.safetensors"),
            )
        }
        self.client.post(
            "/adapters", data={"name": name}, files=files, headers=HEADERS, name="/adapters"
        )
        body = {"model": name, "prompt": "one", "max_tokens": 4}
        self.client.post("/v1/completions", json=body, headers=HEADERS)
        self.client.delete(f"/adapters/{name}", headers=HEADERS, name="/adapters/NAME")
