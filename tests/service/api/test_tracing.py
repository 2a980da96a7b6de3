"""Traces: what a collector gets to see of a request, and what it never does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from adapters.compose import Part
from service.app import create_app
from service.config import ConfigError, Settings, configure
from service.selection import Selection
from service.tracing import open as opening
from service.tracing.open import open_tracing
from service.tracing.otel import OpenTelemetry
from service.tracing.trace import Untraced
from tests.adapters.test_manifest import MANIFEST
from tests.service.api.conftest import PATIENCE, Running, until

CANARY = "canary-7f3a"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


class Traced:
    """A server, and what it has told so far."""

    def __init__(self, running: Running, exporter: InMemorySpanExporter) -> None:
        self.http = httpx.Client(base_url=running.url, timeout=PATIENCE)
        self.running = running
        self._exporter = exporter

    def of(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def request(self, name: str) -> ReadableSpan:
        """The span of a whole request ends after its reply has gone."""
        until(lambda: self.of(name))
        (found,) = self.of(name)
        return found

    def below(self, parent: ReadableSpan) -> dict[str, ReadableSpan]:
        spans = self._exporter.get_finished_spans()
        own = parent.get_span_context().span_id
        return {span.name: span for span in spans if span.parent and span.parent.span_id == own}

    def clear(self) -> None:
        """What is asked from now on is all that there will be."""
        until(lambda: not self.running.server.server_state.tasks)
        self._exporter.clear()

    def text(self) -> str:
        return "".join(span.to_json() for span in self._exporter.get_finished_spans())


@pytest.fixture(scope="module")
def server(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    home = tmp_path_factory.mktemp("traced")
    own = settings.model_copy(
        update={"home": home, "blobs": str(home / "b"), "catalog": f"sqlite:///{home}/c.db"}
    )
    running = Running(create_app(own, tracing=OpenTelemetry(provider, "tiny")))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    traced = Traced(running, exporter)
    yield traced
    traced.http.close()
    running.stop()


@pytest.fixture(autouse=True)
def _forget(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        request.getfixturevalue("server").clear()


def ask(adapter: str | None, **parameters: Any) -> dict[str, Any]:
    named = {"adapter_id": adapter} if adapter else {}
    return {
        "inputs": f"hello {CANARY}",
        "parameters": {"max_new_tokens": 3, "stop": [CANARY], "details": True, **named}
        | parameters,
    }


def test_a_request_is_one_trace_below_its_client_s(
    server: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    body = ask("lora", temperature=0.5, top_p=0.9, seed=7, do_sample=True)
    reply = server.http.post("/generate", json=body, headers=PARENT)
    assert reply.is_success, reply.text
    details = reply.json()["details"]

    request = server.request("POST /generate")
    assert f"{request.get_span_context().trace_id:032x}" == TRACE
    assert request.parent is not None
    assert request.parent.is_remote
    assert request.kind is SpanKind.SERVER
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "nibble.request.id": reply.headers["x-request-id"],
    }

    (generation,) = server.below(request).values()
    assert generation.name == "text_completion lora"
    said = dict(generation.attributes or {})
    assert said == {
        "gen_ai.provider.name": "nibble",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "lora",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.id": reply.headers["x-request-id"],
        "gen_ai.response.model": "lora@1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": details["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "nibble.adapter.digest": details["adapter"]["digest"],
        "nibble.adapter.placement": "unmerged",
    }

    phases = server.below(generation)
    assert set(phases) == {"adapter load", "queue", "prefill", "decode"}
    load, queue, prefill, decode = (
        phases[name] for name in ("adapter load", "queue", "prefill", "decode")
    )
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert generation.start_time <= load.start_time < load.end_time <= prefill.start_time  # type: ignore[operator]
    assert generation.start_time < queue.start_time  # type: ignore[operator]
    assert decode.end_time <= generation.end_time <= request.end_time  # type: ignore[operator]
    said_of_spans = [one for one in caplog.records if one.name.startswith("opentelemetry")]
    assert not said_of_spans, "nothing is told to a span that has ended"


def test_a_warm_adapter_is_not_loaded_again(server: Traced) -> None:
    for _ in range(2):
        server.clear()
        assert server.http.post("/generate", json=ask("dora")).is_success
    generation = server.request("text_completion dora")
    assert set(server.below(generation)) == {"queue", "prefill", "decode"}


def test_a_load_is_told_to_who_waits_for_these_weights_whatever_they_are_called() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    ours = OpenTelemetry(provider, "m")
    plain = replace(MANIFEST, placement="unmerged")

    def waiting(tenant: str, digest: str) -> Selection:
        selection = Selection((Part(replace(plain, digest=digest * 64), 1.0),), tenant=tenant)
        generation = ours.generation(f"{tenant} {digest}")
        generation.chosen("chat", selection)
        begun.append(generation)
        return selection

    begun: list[Any] = []
    one = waiting("acme", "a")
    other = waiting("zeta", "a")  # another tenant's name for the same weights
    newer = waiting("acme", "b")  # another version of the same name
    assert one.ref.name != other.ref.name
    assert one.ref.name == newer.ref.name
    ours.adapter_loaded(one.ref.key, 0.1, 10, 0.0)
    for generation in begun:
        generation.failed(ValueError())
    ours.adapter_loaded(one.ref.key, 0.1, 10, 0.0)  # nobody waits any more
    spans = exporter.get_finished_spans()
    told = {
        span.context.span_id: (span.attributes or {})["gen_ai.response.id"]
        for span in spans
        if span.name != "adapter load"
    }
    loads = [span.parent for span in spans if span.name == "adapter load"]
    assert sorted(told[one.span_id] for one in loads if one) == ["acme a", "zeta a"]


def test_chats_and_several_answers(server: Traced) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": CANARY}],
        "max_tokens": 2,
        "n": 2,
    }
    reply = server.http.post("/v1/chat/completions", json=body | {"model": "mini"})
    assert reply.is_success, reply.text
    generation = server.request("chat tiny")
    said = dict(generation.attributes or {})
    assert said["gen_ai.request.choice.count"] == 2
    assert len(said["gen_ai.response.finish_reasons"]) == 2  # type: ignore[arg-type]
    assert said["gen_ai.usage.output_tokens"] == reply.json()["usage"]["completion_tokens"]
    decoded = {(span.attributes or {})["nibble.sequence.index"] for span in server.of("decode")}
    assert decoded == {0, 1}


def test_a_stream_says_so_and_when_it_began(server: Traced) -> None:
    reply = server.http.post("/generate_stream", json=ask("lora"))
    assert reply.is_success, reply.text
    said = dict(server.request("text_completion lora").attributes or {})
    assert said["gen_ai.request.stream"] is True
    first = said["gen_ai.response.time_to_first_chunk"]
    assert isinstance(first, float)
    assert 0 < first < PATIENCE


def test_who_goes_ends_the_span_as_aborted(server: Traced) -> None:
    body = ask(None, max_new_tokens=60, ignore_eos_token=True) | {"stream": True}
    with server.http.stream("POST", "/generate_stream", json=body) as reply:
        assert reply.is_success
        next(reply.iter_lines())
    generation = server.request("text_completion tiny")
    said = dict(generation.attributes or {})
    assert said["gen_ai.response.finish_reasons"] in (("abort",), ("length",))
    server.request("POST /generate_stream")


def test_refusals_carry_their_type_and_no_words(server: Traced) -> None:
    missing = server.http.post("/generate", json=ask(f"nobody-{CANARY}"))
    assert missing.status_code == 404
    generation = server.request("generation")
    assert (generation.attributes or {})["error.type"] == "AdapterNotFound"
    assert generation.status.status_code is StatusCode.ERROR
    request = server.request("POST /generate")
    assert request.status.status_code is StatusCode.UNSET, "the client's fault is no error here"
    wrong = server.http.post("/generate", json={"inputs": CANARY, CANARY: 1})
    assert wrong.status_code == 422
    until(lambda: len(server.of("POST /generate")) == 2)
    assert CANARY not in server.text()


def test_no_word_of_a_client_is_told(server: Traced) -> None:
    assert server.http.post("/generate", json=ask("lora")).is_success
    assert server.http.get(f"/adapters/{CANARY}?{CANARY}=1").status_code == 404
    server.request("POST /generate")
    server.request("GET /adapters/{name}")
    assert CANARY not in server.text()


def test_probes_make_no_spans(server: Traced) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert server.http.get(path).is_success
    assert server.http.get("/info").is_success
    server.request("GET /info")
    assert len(server.text().split('"name"')) == 2


def test_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in opening.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert isinstance(open_tracing(None, "m", "1"), Untraced)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    found = open_tracing(None, "m", "1")
    assert isinstance(found, OpenTelemetry)
    found.close()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert isinstance(open_tracing("http://127.0.0.1:9/v1/traces", "m", "1"), Untraced)


def test_without_the_library_a_setting_is_refused_and_a_variable_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("service.config.can_trace", lambda: False)
    monkeypatch.setattr(opening, "can_trace", lambda: False)
    with pytest.raises(
        ConfigError, match=r"otlp-traces-endpoint: needs OpenTelemetry: .*'\.\[otel\]'"
    ):
        configure({"otlp_traces_endpoint": "http://127.0.0.1:9"})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert isinstance(open_tracing(None, "m", "1"), Untraced)


def test_a_collector_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        serving = threading.Thread(target=collector.serve_forever)
        serving.start()
        ours = open_tracing(f"http://127.0.0.1:{collector.server_port}/v1/traces", "m", "9.9")
        scope = {
            "path": "/generate",
            "method": "POST",
            "scheme": "http",
            "headers": [],
            "request_id": "r",
        }
        with ours.passage(scope) as passage:
            assert len(passage.trace_id) == 32
            passage.answered(503)
        ours.close()
        collector.shutdown()
        serving.join()
    ((path, body),) = got
    assert path == "/v1/traces"
    sent = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    resource = {one.key: one.value.string_value for one in sent.resource.attributes}
    assert resource["service.name"] == "nibble"
    assert resource["service.version"] == "9.9"
    assert resource["deployment.environment"] == "test"
    (span,) = sent.scope_spans[0].spans
    assert (span.name, span.status.code) == ("POST", span.status.STATUS_CODE_ERROR)
