"""What the schemas of all skins share. Every number a client can send has two bounds."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.api.errors import ErrorEnvelope
from service.api.openai_errors import refusal
from service.config import MAX_DRAFT_TOKENS
from service.selection import MAX_REFERENCE

MAX_TOKENS = 1 << 20
MAX_SEED = (1 << 63) - 1024  # n sequences use seed, seed + 1, …
MAX_SEQUENCES = 16
MAX_TOP_TOKENS = 20
MAX_CLIENT_KEY = 256  # characters
DRAFTS = (
    "Speculative decoding by prompt lookup: most tokens that one step may guess from what stands "
    "in prompt and output. 0 is off; when left out, as the server is set. The output is the same."
)

Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 24) - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Reference = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
ClientKey = Annotated[str, Field(min_length=1, max_length=MAX_CLIENT_KEY)]
PathName = Annotated[str, Path(min_length=1, max_length=MAX_REFERENCE)]


class Incoming(BaseModel):
    """A body, read strictly: no "5" for 5, no unknown field. A null counts as left out, because
    clients send every field they know."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class Outgoing(BaseModel):
    """A reply's schema: for the OpenAPI page, and for the tests that hold replies against it."""

    model_config = ConfigDict(extra="forbid")


class PartDetails(Outgoing):
    """One adapter of a sum."""

    name: str
    version: int
    digest: str
    weight: float


class AdapterDetails(Outgoing):
    """Which adapter served a request: the digest is its identity."""

    name: str
    version: int | None = Field(description="Null for a sum, which is no version of anything.")
    digest: str
    placement: str
    alias: str | None = Field(default=None, description="The alias that chose this version.")
    parts: list[PartDetails] | None = Field(
        default=None, description="Of a sum: what it is made of, in the order of the digests."
    )


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for errors, all in the one envelope."""
    return {status: refusal(status, ErrorEnvelope) for status in statuses}
