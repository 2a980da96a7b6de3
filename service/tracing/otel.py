"""Traces for OpenTelemetry, with the attributes of its conventions for HTTP and generative AI.

    POST /v1/chat/completions          the request, under whatever trace its client began
      chat support                     one prompt
        adapter load                   where its adapter was not in memory
        queue, prefill, decode         of each sequence

Spans go to an OTLP collector over HTTP. Sampling, headers, limits and the service's name are set by
OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME).
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.engine.request import AdapterKey, Event, Finished, Request, Token
from service.engine.stream import EventStream
from service.metrics import REASONS
from service.selection import Selection
from service.tracing.trace import Operation

QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, by machines
CLOSE_SECONDS = 3.0
SECOND = 1_000_000_000  # OpenTelemetry counts nanoseconds
PHASES = ("queue", "prefill", "decode")


def to_collector(endpoint: str | None, model: str, version: str) -> OpenTelemetry:
    """Traces to the collector at `endpoint`, else to where OpenTelemetry's variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    said: dict[str, Any] = {"service.version": version}
    named = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in named:
        said["service.name"] = "nibble"
    provider = TracerProvider(resource=Resource.create(said), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OpenTelemetry(provider, model)


class OpenTelemetry:
    """A `Tracing` over one provider. Thread-safe."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self.model = model
        self.tracer = provider.get_tracer("nibble")
        self._provider = provider
        self._parents = TraceContextTextMapPropagator()
        self._lock = threading.Lock()
        self._waiting: defaultdict[AdapterKey, set[_Generation]] = defaultdict(set)

    @contextmanager
    def passage(self, scope: Mapping[str, Any]) -> Iterator[_Passage]:
        """The span of one HTTP request; it is the current one within."""
        if scope["path"] in QUIET:
            yield _Passage(trace.INVALID_SPAN, scope)
            return
        names = ("traceparent", "tracestate")
        carried = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name.decode("latin-1") in names
        }
        with self.tracer.start_as_current_span(
            scope["method"][:16],
            self._parents.extract(carried),
            SpanKind.SERVER,
            {"http.request.method": scope["method"][:16], "url.scheme": scope["scheme"]},
            record_exception=False,  # its message may quote the request
            set_status_on_exception=False,
        ) as span:
            yield _Passage(span, scope)

    def generation(self, request_id: str) -> _Generation:
        return _Generation(self, request_id)

    def adapter_loaded(self, key: AdapterKey, seconds: float, nbytes: int, queued: float) -> None:
        """Engine's thread: every prompt that waits for this adapter waited for this load, whatever
        its tenant calls it."""
        now = time.time_ns()
        with self._lock:
            waiting = list(self._waiting.get(key, ()))
        for one in waiting:
            one.loaded(now - round(seconds * SECOND), now, nbytes, queued)

    def wait(self, key: AdapterKey, one: _Generation) -> None:
        with self._lock:
            self._waiting[key].add(one)

    def wait_no_more(self, key: AdapterKey, one: _Generation) -> None:
        with self._lock:
            self._waiting[key].discard(one)
            if not self._waiting[key]:
                del self._waiting[key]

    def close(self) -> None:
        """A collector that does not answer costs a stopping server CLOSE_SECONDS, no more."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class _Passage:
    def __init__(self, span: Span, scope: Mapping[str, Any]) -> None:
        self._span = span
        self._scope = scope
        found = span.get_span_context()
        self.trace_id = format_trace_id(found.trace_id) if found.is_valid else ""

    def answered(self, status: int) -> None:
        # The route and not the path: paths hold the names of adapters and documents.
        route = getattr(self._scope.get("route"), "path", None)
        if route is not None:
            self._span.update_name(f"{self._scope['method'][:16]} {route}")
            self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attribute("nibble.request.id", self._scope["request_id"])
        if status >= 500 or not status:  # 0: the connection was cut
            self._span.set_attribute("error.type", str(status or "disconnected"))
            self._span.set_status(Status(StatusCode.ERROR))


class _Generation:
    def __init__(self, ours: OpenTelemetry, request_id: str) -> None:
        self._ours = ours
        self._begun = time.time_ns()
        self._span = ours.tracer.start_span("generation")
        self._within = trace.set_span_in_context(self._span)
        self._span.set_attributes(
            {"gen_ai.provider.name": "nibble", "gen_ai.response.id": request_id}
        )
        self._waits_for: AdapterKey | None = None
        self._streamed = False
        self._lock = threading.Lock()
        self._open = True

    def chosen(self, operation: Operation, selection: Selection | None) -> None:
        model = selection.ref.name if selection else self._ours.model
        self._span.update_name(f"{operation} {model}")
        said: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
        }
        if selection is not None:
            ref = selection.ref
            said |= {"nibble.adapter.digest": ref.digest, "nibble.adapter.placement": ref.placement}
            if selection.single:
                version = selection.parts[0].manifest.version
                said["gen_ai.response.model"] = f"{selection.parts[0].manifest.name}@{version}"
            self._waits_for = ref.key
            self._ours.wait(ref.key, self)
        self._span.set_attributes(said)

    def followed(self, stream: EventStream, request: Request) -> EventStream:
        sampling = request.sampling
        said: dict[str, Any] = {
            "gen_ai.request.max_tokens": sampling.max_new_tokens,
            "gen_ai.request.temperature": sampling.temperature if sampling.do_sample else 0.0,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
        if sampling.seed is not None:
            said["gen_ai.request.seed"] = sampling.seed
        if request.n != 1:
            said["gen_ai.request.choice.count"] = request.n
        if request.streamed:
            said["gen_ai.request.stream"] = self._streamed = True
        self._span.set_attributes(said)
        return _Followed(stream, request.n, self)

    def failed(self, error: BaseException) -> None:
        self._end(type(error).__name__)

    def loaded(self, begun: int, ended: int, nbytes: int, queued: float) -> None:
        """Engine's thread."""
        said = {"nibble.adapter.bytes": nbytes, "nibble.adapter.load.queue_seconds": queued}
        with self._lock:
            if self._open:
                self._child("adapter load", max(begun, self._begun), ended, said)

    def started(self) -> None:
        """Its first token has come, so its adapter has."""
        if self._waits_for is not None:
            self._ours.wait_no_more(self._waits_for, self)
            self._waits_for = None

    def phases(self, end: Finished, begun: int, several: bool) -> None:
        """The spans of one sequence, one behind the other."""
        said = {"nibble.sequence.index": end.index} if several else {}
        lasted = (end.queue_seconds, end.prefill_seconds, end.decode_seconds)
        for phase, seconds in zip(PHASES, lasted, strict=True):
            ended = begun + round(seconds * SECOND)
            if seconds:
                self._child(phase, begun, ended, said)
            begun = ended

    def ended(self, ends: list[Finished], wanted: int) -> None:
        """All sequences have ended, or nobody wants the others; only the first time counts."""
        if not self._open:
            return
        reasons = [REASONS[end.reason] for end in ends] + ["abort"] * (wanted - len(ends))
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        if ends:
            if self._streamed:
                first = min(end.queue_seconds + end.prefill_seconds for end in ends)
                self._span.set_attribute("gen_ai.response.time_to_first_chunk", first)
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": ends[0].prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": max(e.cached_tokens for e in ends),
                    "gen_ai.usage.output_tokens": sum(e.generated_tokens for e in ends),
                }
            )
        faults = [type(end.error).__name__ for end in ends if end.error is not None]
        self._end(faults[0] if faults else "")

    def _child(self, name: str, begun: int, ended: int, said: Mapping[str, Any]) -> None:
        span = self._ours.tracer.start_span(
            name, self._within, attributes=dict(said), start_time=begun
        )
        span.end(ended)

    def _end(self, fault: str) -> None:
        self.started()
        with self._lock:
            if not self._open:
                return
            self._open = False
        if fault:
            self._span.set_attribute("error.type", fault)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class _Followed:
    """An EventStream that tells its generation what came."""

    def __init__(self, stream: EventStream, sequences: int, generation: _Generation) -> None:
        self._stream = stream
        self._sequences = sequences
        self._generation = generation
        self._begun = time.time_ns()
        self._ends: list[Finished] = []

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in self._stream:
            if isinstance(event, Token):
                self._generation.started()
            else:
                self._ends.append(event)
                self._generation.phases(event, self._begun, self._sequences > 1)
                if len(self._ends) == self._sequences:
                    self._generation.ended(self._ends, self._sequences)
            yield event

    def cancel(self) -> None:
        self._stream.cancel()
        self._generation.ended(self._ends, self._sequences)
