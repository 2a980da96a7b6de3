"""What a tracer is told, and the one that keeps nothing. No OpenTelemetry here.

A passage is one HTTP request; a generation is one prompt of it, from admission to its last token.
Neither is ever told a prompt, an output, a stop string or the message of an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from service.engine.observer import Observer
    from service.engine.request import AdapterKey, Request
    from service.engine.stream import EventStream
    from service.selection import Selection

Operation = Literal["chat", "text_completion", "embeddings"]


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
    def adapter_loaded(
        self, key: AdapterKey, seconds: float, nbytes: int, queued: float
    ) -> None: ...
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
    def adapter_loaded(
        self, key: AdapterKey, seconds: float, nbytes: int, queued: float
    ) -> None: ...
    def close(self) -> None: ...

    def followed(self, stream: EventStream, request: Request) -> EventStream:
        return stream


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

    def adapter_loaded(self, key: AdapterKey, seconds: float, nbytes: int, queued: float) -> None:
        self._observer.adapter_loaded(key, seconds, nbytes, queued)
        self._tracing.adapter_loaded(key, seconds, nbytes, queued)
