"""What somebody may have meant: another field of the same body, another path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from starlette.requests import Request
from starlette.routing import Match

LISTED = 12  # names that are worth reading
LONGEST = 64  # characters of a name that may be a slip of another
ALIKE = 0.75  # of a slip of the pen
PREFIXES = ("/v1", "/api")  # which one client wants and another forgets


def of_field(endpoint: Callable[..., Any] | None, loc: Sequence[Any]) -> str:
    """What is known where `loc` names an unknown field, or ""."""
    found = _fields(endpoint, loc[1:-1])
    name = loc[-1]
    if not found or not isinstance(name, str) or len(name) > LONGEST:
        return ""
    for parent, field in found.items():
        inside = _model(field.annotation)
        if inside is not None and name in _named(inside):
            return f"; it belongs in {parent}"
    if close := get_close_matches(name, found, 1, ALIKE):
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(sorted(found))}" if len(found) <= LISTED else ""


def of_path(request: Request) -> str:
    """The path that is there where one with a prefix too many or too few was asked for, or ""."""
    path = request.url.path
    tried = [path.rstrip("/"), *(prefix + path for prefix in PREFIXES)]
    tried += [path.removeprefix(prefix) for prefix in PREFIXES]
    there = (one for one in tried if one not in ("", "/", path) and _is_there(request, one))
    found = next(there, None)
    return f"; did you mean {found}?" if found else ""


def _is_there(request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] is not Match.NONE for route in request.app.routes)


def _fields(endpoint: Callable[..., Any] | None, inside: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """The fields of the body of `endpoint`, or of the model that lies `inside` it."""
    if endpoint is None:
        return {}
    hints = get_type_hints(endpoint).values()
    model = next((one for one in hints if _model(one) is one), None)
    for part in inside:
        if isinstance(part, str) and model is not None:
            field = _named(model).get(part)
            model = _model(field.annotation) if field else None
    return _named(model) if model is not None else {}


def _named(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _model(annotation: Any) -> type[BaseModel] | None:
    """The one model in an annotation; None where there is none, or a choice."""
    found = set(_models(annotation))
    return found.pop() if len(found) == 1 else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
