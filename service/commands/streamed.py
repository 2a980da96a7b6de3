"""The text of a stream, piece by piece, as a terminal or a pipe gets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def pieces(events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What each event of `/generate_stream` adds to the text; together, the whole output once."""
    shown = ""
    for event in events:
        # The last event brings the whole output: also what was held back as a possible stop string.
        whole = event.get("generated_text")
        if whole is not None:
            text = whole[len(shown) :] if whole.startswith(shown) else ""
        else:
            text = "" if event["token"]["special"] else event["token"]["text"]
        shown += text
        yield text
