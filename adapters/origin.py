"""training.json: how a version came about, as the run that made it wrote it beside the adapter.

An upload brings it along, and its fields stand in the version's provenance as those of a job over
HTTP do. Whoever uploads it vouches for it; nothing here changes how the adapter is served.
"""

from __future__ import annotations

from typing import Any

from adapters.errors import InvalidAdapter
from adapters.evaluation import checked_object

FILE = "training.json"
KEY = "training"  # the part of an upload
# The config of the run, the digests of its data, what it did, and its prompt template's digest.
FIELDS = ("config", "data", "run", "prompt_template")


def checked(raw: bytes) -> dict[str, Any]:
    """The file's part of a provenance. Raises InvalidAdapter, TooLarge."""
    found = checked_object(raw, KEY)
    unknown = sorted(found.keys() - set(FIELDS))
    if unknown:
        raise InvalidAdapter(f"has the field {unknown[0]!r}; {', '.join(FIELDS)} are known", KEY)
    return found
