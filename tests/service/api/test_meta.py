"""The server about itself."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.meta import Info, TokenPiece
from service.app import create_app
from service.config import Settings
from tests.service.api.conftest import Running


def test_info(client: httpx.Client, server: Running) -> None:
    info = Info.model_validate(client.get("/info").json())
    serving = server.desk.serving
    assert serving is not None
    assert info.base.fingerprint == serving.spec.fingerprint
    assert info.max_total_tokens == info.max_input_tokens + 1 == 1024
    assert (info.model_dtype, info.model_device_type) == ("float32", "cpu")
    assert info.precision == serving.precision
    assert info.kv_dtype == info.model_dtype  # "auto"


def test_tokenize_says_where(client: httpx.Client, server: Running) -> None:
    text = "two  boats, 한글 é"
    reply = client.post("/tokenize", json={"inputs": text}).json()
    pieces = [TokenPiece.model_validate(one) for one in reply]
    serving = server.desk.serving
    assert serving is not None
    tokenizer = serving.assembly.tokenizer
    assert [one.id for one in pieces] == tokenizer.encode(text, add_special_tokens=False)
    assert all(one.text == text[one.start : one.stop] for one in pieces)
    assert (pieces[0].start, pieces[-1].stop) == (0, len(text))


TIERS = ("slot", "host", "store")


def test_metrics_count_what_happened(client: httpx.Client, server: Running) -> None:
    def read() -> dict[tuple[str, str], float]:
        text = client.get("/metrics").text
        return {
            (sample.name, sample.labels.get("finished_reason", sample.labels.get("tier", ""))): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    server.settle()
    before = read()
    parameters = {"max_new_tokens": 7, "ignore_eos": True, "adapter_id": "lora", "truncate": 3}
    body = {"inputs": "a b c d e f", "parameters": parameters}
    assert client.post("/generate", json=body).status_code == 200
    server.settle()
    after = read()

    def grew(name: str, reason: str = "") -> float:
        return after[name, reason] - before[name, reason]

    assert grew("vllm:generation_tokens_total") == 7
    assert grew("vllm:prompt_tokens_total") == 3
    assert grew("vllm:request_success_total", "length") == 1
    assert grew("vllm:time_to_first_token_seconds_count") == 1
    assert grew("vllm:inter_token_latency_seconds_count") == 6
    assert grew("vllm:e2e_request_latency_seconds_count") == 1
    assert sum(grew("nibble:adapter_lookups_total", tier) for tier in TIERS) == 1


@pytest.mark.parametrize(
    ("state", "kind"), [("loading", "loading"), ("draining", "draining"), ("failed", "unavailable")]
)
def test_health_and_readiness_before_and_after(settings: Settings, state: Any, kind: str) -> None:
    """Without a base: alive from the first moment, ready only with everything there."""
    app = create_app(settings)
    app.state.desk.admission.state = state

    async def ask(method: str, path: str, **rest: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as found:
            return await found.request(method, path, **rest)

    assert asyncio.run(ask("GET", "/health")).status_code == 200
    for method, path, rest in (
        ("GET", "/ready", {}),
        ("GET", "/info", {}),
        ("GET", "/adapters", {}),
        ("POST", "/generate", {"json": {"inputs": "a"}}),
        ("POST", "/adapters", {"files": {"name": (None, "a")}}),
    ):
        reply = asyncio.run(ask(method, path, **rest))
        assert reply.status_code == 503, path
        assert reply.json()["error_type"] == kind
        assert reply.headers["retry-after"] == "5"
    assert asyncio.run(ask("GET", "/metrics")).status_code == 200
