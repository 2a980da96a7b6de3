"""evaluation.json: what was measured of an adapter, kept with the version in its provenance.

It says nothing about how the adapter is served; whoever uploads it vouches for it, as for the
weights. So it is bounded and has to be JSON, and its figures are shown as they are.
"""

from __future__ import annotations

import json
import math
from typing import Any

from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import KIB

FILE = "evaluation.json"
KEY = "evaluation"  # in the provenance
LIST = "evaluations"  # in the file: one entry for each set of questions, newest last
MAX_BYTES = 128 * KIB
DEPTH = 12


def checked(raw: bytes) -> dict[str, Any]:
    """The file as an object. Raises InvalidAdapter, TooLarge."""
    return checked_object(raw, KEY)


def checked_object(raw: bytes, where: str) -> dict[str, Any]:
    """A bounded JSON object that comes along with an upload, in its part `where`.

    Raises InvalidAdapter, TooLarge.
    """
    if len(raw) > MAX_BYTES:
        raise TooLarge(f"more than {MAX_BYTES} bytes", where)
    try:
        found = json.loads(raw.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"is not JSON: {str(error)[:200]}", where) from None
    if not isinstance(found, dict):
        raise InvalidAdapter(f"is a {type(found).__name__}; an object is expected", where)
    _check(found, DEPTH, where)
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check(value: Any, depth: int, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidAdapter(f"holds {value}, which is no number", where)
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        if depth == 0:
            raise InvalidAdapter(f"is nested deeper than {DEPTH}", where)
        for each in inner:
            _check(each, depth - 1, where)
