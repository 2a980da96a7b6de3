"""Which model a request of the OpenAI skin means: the base by one of its names, or adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.compose import FIELD, Term, parse_terms
from adapters.errors import AdapterNotFound, InvalidAdapter
from service.api.deps import Desk, Serving
from service.api.errors import Refused
from service.api.intake import Names
from service.errors import InvalidRequest

CHAT = Names("messages", "model", "max_completion_tokens", "stop_token_ids", "logit_bias")
TEXT = Names("prompt", "model", "max_tokens", "stop_token_ids", "logit_bias")
EMBEDDED = Names("input", "model")


def terms_of(model: str, desk: Desk, serving: Serving) -> tuple[Term, ...]:
    """The adapters that `model` names; none for the base. Raises Refused 404."""
    if model == serving.spec.id or model in desk.settings.base_names:
        return ()
    try:
        return parse_terms(model)
    except InvalidAdapter as error:
        raise not_found(model) from error


@contextmanager
def model_errors(model: str) -> Iterator[None]:
    """An adapter that is not there is a model that is not there."""
    try:
        yield
    except AdapterNotFound as error:
        raise not_found(model) from error
    except InvalidRequest as error:
        if error.field != FIELD:
            raise
        raise InvalidRequest(str(error), "model") from error


def not_found(model: str) -> Refused:
    return Refused(
        404,
        "model_not_found",
        f"the model {model[:200]!r} does not exist here; GET /v1/models lists those that do",
        "model",
    )
