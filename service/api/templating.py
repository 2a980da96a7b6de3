"""What every skin offers of prompt templates: the request's `template`, and what a reply tells."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from adapters.prompts.shelf import MAX_REFERENCE, StoredTemplate
from adapters.prompts.template import MAX_VARIABLES
from service.api.wire import Incoming, Outgoing
from service.prompt.templates import TemplateAsked

MAX_VERSION = 10**9 - 1
Variables = Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)]


class TemplateUse(Incoming):
    """Which template, and with what: never its source."""

    name: str = Field(
        min_length=1,
        max_length=MAX_REFERENCE,
        description="`name`, `name@version` or `name@alias`.",
    )
    version: int | None = Field(
        default=None, ge=1, le=MAX_VERSION, description="The newest when left out."
    )
    variables: Variables = Field(default_factory=dict)

    @property
    def asked(self) -> TemplateAsked:
        return TemplateAsked(self.name, self.version, self.variables)


class TemplateDetails(Outgoing):
    """Which template made a prompt: the digest is of its content."""

    name: str
    version: int
    digest: str


def served_by(stored: StoredTemplate) -> dict[str, Any]:
    """`TemplateDetails`."""
    return {"name": stored.name, "version": stored.version, "digest": stored.digest}
