"""Logs: one line per event, as text or JSON, with the request's id. Bodies never get here.

Our own lines are written at once: by way of the standard library, as those of libraries come, each
would cost three times as much.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Literal

import structlog
from structlog.typing import Processor


def configure_logging(level: str, layout: Literal["text", "json"]) -> None:
    """Send structlog's and the standard library's lines to standard error, in one layout."""
    stamped: Sequence[Processor] = (
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    )
    rendering = _rendering(layout)
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=stamped,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [output]
    root.setLevel(level.upper())
    # Libraries speak up when something is wrong; their progress is not ours to tell.
    for name in ("httpx", "httpcore", "urllib3", "transformers", "alembic", "uvicorn"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*stamped, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        logger_factory=Lines,
        cache_logger_on_first_use=True,
    )


class Lines(structlog.WriteLogger):
    """Writes lines to standard error, and has a name."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(sys.stderr)
        self.name = name


def _rendering(layout: Literal["text", "json"]) -> list[Processor]:
    if layout == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # Plain tracebacks: the pretty ones print local variables, and those may be prompts.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
