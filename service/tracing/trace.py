"""What a tracer is told, and the one that keeps nothing. No OpenTelemetry here.

A passage is one HTTP request; a generation is one prompt of it, from admission to its last token.
Neither is ever told a prompt, an output, a stop string or the message of an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import structlog

if TYPE_CHECKING:  # the configuration looks in here, and is read in no time
    from service.engine.observer import Observer
    from service.engine.request import Request
    from service.engine.stream import EventStream
    from service.selection import Selection

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Operation = Literal["chat", "text_completion", "embeddings"]
logger = structlog.get_logger("nibble.tracing")


class Passage(Protocol):
    """One HTTP request on its way."""

    @property
    def trace_id(self) -> str: ...  # empty where it is not traced
    def answered(self, status: int) -> None: ...


class Generation(Protocol):
    """One prompt on its way."""

    def chosen(self, operation: Operation, selection: Selection | None) -> None: ...
    def followed(self, stream: EventStream, request: Request) -> EventStream: ...
    def failed(self, error: BaseException) -> None: ...


class Tracing(Protocol):
    """Makes both, and hears from the engine which adapters were loaded.

    adapter_loaded   as an `Observer` hears it, from the engine's thread
    close            sends what has not been sent yet; blocks for a moment
    """

    def passage(self, scope: Mapping[str, Any]) -> AbstractContextManager[Passage]: ...
    def generation(self, request_id: str) -> Generation: ...
    def adapter_loaded(self, name: str, seconds: float, nbytes: int, queued: float) -> None: ...
    def close(self) -> None: ...


class Untraced:
    """A tracer, a passage and a generation that keep nothing."""

    trace_id = ""

    @contextmanager
    def passage(self, scope: Mapping[str, Any]) -> Iterator[Untraced]:
        yield self

    def generation(self, request_id: str) -> Untraced:
        return self

    def answered(self, status: int) -> None: ...
    def chosen(self, operation: Operation, selection: Selection | None) -> None: ...
    def failed(self, error: BaseException) -> None: ...
    def adapter_loaded(self, name: str, seconds: float, nbytes: int, queued: float) -> None: ...
    def close(self) -> None: ...

    def followed(self, stream: EventStream, request: Request) -> EventStream:
        return stream


def can_trace() -> bool:
    """Whether OpenTelemetry is installed (the extra `otel`)."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def open_tracing(endpoint: str | None, model: str, version: str) -> Tracing:
    """Traces to `endpoint`, or to where OpenTelemetry's own variables say; else to nowhere."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if off or not (endpoint or any(os.environ.get(name) for name in VARIABLES)):
        return Untraced()
    if not can_trace():  # a cluster may set the variables for all that runs in it
        logger.warning("not traced", why="OpenTelemetry is not installed: nibble-serve[otel]")
        return Untraced()
    from service.tracing.otel import to_collector  # half a second, and only needed here

    return to_collector(endpoint, model, version)


def traced(observer: Observer, tracing: Tracing) -> Observer:
    """The engine's observer, with the tracer beside it where there is one."""
    if isinstance(tracing, Untraced):
        return observer
    return cast("Observer", _Traced(observer, tracing))


class _Traced:
    """Another observer, but for what the tracer wants to hear too."""

    def __init__(self, observer: Observer, tracing: Tracing) -> None:
        self._observer = observer
        self._tracing = tracing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer, name)

    def adapter_loaded(self, name: str, seconds: float, nbytes: int, queued: float) -> None:
        self._observer.adapter_loaded(name, seconds, nbytes, queued)
        self._tracing.adapter_loaded(name, seconds, nbytes, queued)
