"""Which tracer serves: OpenTelemetry's where somebody collects, else the one that keeps nothing."""

from __future__ import annotations

import os
from importlib.util import find_spec

import structlog

from base.extras import install
from service.tracing.trace import Tracing, Untraced

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
logger = structlog.get_logger("nibble.tracing")


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
        logger.warning(
            "not traced",
            why=f"OpenTelemetry is not installed: {install('otel')}",
        )
        return Untraced()
    from service.tracing.otel import to_collector  # half a second, and only needed here

    return to_collector(endpoint, model, version)
