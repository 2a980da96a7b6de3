"""Feedback for requests, and the A/B table that it makes of an alias."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from adapters.intervals import CONFIDENCE, Interval
from service.api.access import Guarded, needs
from service.api.deps import ServingDep
from service.api.errors import Refused
from service.api.wire import Fraction, Incoming, Outgoing, PathName, refusals
from service.experiments import ArmFigures, Difference, Experiment

MAX_COMMENT = 2000  # characters

router = APIRouter(tags=["experiments"], route_class=Guarded)


class FeedbackBody(Incoming):
    """How good the reply of one request was. Given again, it replaces what was given before."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"request_id": "3f2a9c0d51e84b7f", "score": 1, "comment": "to the point"}]
        }
    )

    request_id: str = Field(min_length=1, max_length=64, description="`x-request-id` of its reply.")
    score: bool | Fraction = Field(description="From 0, useless, to 1; or true, false.")
    comment: str | None = Field(default=None, min_length=1, max_length=MAX_COMMENT)


class FeedbackView(Outgoing):
    """The version that the feedback went to."""

    request_id: str
    name: str
    alias: str
    version: int
    score: float
    replaced: float | None = Field(description="The score that was given before.")


class IntervalView(Outgoing):
    """An estimate with its confidence interval; without bounds where one number is all there is."""

    estimate: float
    low: float | None
    high: float | None


class ArmView(Outgoing):
    """One version: what it was asked, how it did, and what people said."""

    version: int
    digest: str = Field(description="Empty where the version was deleted since.")
    weight: float = Field(description="0: the alias does not point to it any more.")
    requests: int
    failed: int
    cancelled: int = Field(description="Broken off by their clients.")
    prompt_tokens: int
    generated_tokens: int
    scored: int
    feedback: IntervalView | None = Field(
        description="Mean score: Wilson's interval where all are 0 or 1, else Student's."
    )
    completed: IntervalView | None = Field(description="Share of requests without an error.")
    first_token_seconds: IntervalView | None
    total_seconds: IntervalView | None


class DifferenceView(Outgoing):
    """One version's means less the control's; an interval without 0 in it is a difference."""

    version: int
    control: int
    feedback: IntervalView | None = Field(
        description="Newcombe's interval where all scores are 0 or 1, else Welch's."
    )
    first_token_seconds: IntervalView | None
    total_seconds: IntervalView | None


class CommentView(Outgoing):
    version: int
    score: float
    comment: str


class ExperimentView(Outgoing):
    """The A/B table of an alias."""

    name: str
    alias: str
    confidence: float
    arms: list[ArmView] = Field(description="The control first: the version with most requests.")
    differences: list[DifferenceView]
    comments: list[CommentView] = Field(description="The newest first.")


@router.post(
    "/feedback", responses={200: {"model": FeedbackView}, **refusals(404, 413, 415, 422, 503, 507)}
)
@needs("infer")
async def feedback(body: FeedbackBody, serving: ServingDep) -> JSONResponse:
    """Say how good a reply was. Requests that came through an alias are remembered for a week,
    the newest 100,000 of them."""
    found = await asyncio.to_thread(
        serving.experiments.score,
        body.request_id,
        float(body.score),
        body.comment,
        serving.caller.tenant,
    )
    if found is None:
        raise Refused(
            404,
            "not_found",
            f"no request {body.request_id!r} is remembered: feedback goes to requests that have "
            "ended and named an alias, such as support@prod, not too long ago",
            "request_id",
        )
    return JSONResponse(asdict(found))


@router.get(
    "/adapters/{name}/experiments/{alias}",
    responses={200: {"model": ExperimentView}, **refusals(404, 422, 503)},
)
@needs("adapters:read")
async def experiment(name: PathName, alias: PathName, serving: ServingDep) -> JSONResponse:
    """What each version behind `name@alias` did: counts, latencies and feedback with their
    confidence intervals, and how much each differs from the control."""
    found = await asyncio.to_thread(serving.experiments.table, name, alias, serving.caller.tenant)
    return JSONResponse(_view(found))


def _view(found: Experiment) -> dict[str, Any]:
    return {
        "name": found.name,
        "alias": found.alias,
        "confidence": CONFIDENCE,
        "arms": [_arm(one) for one in found.arms],
        "differences": [_difference(one) for one in found.differences],
        "comments": [
            {"version": one.version, "score": one.score, "comment": one.text}
            for one in found.comments
        ],
    }


def _arm(one: ArmFigures) -> dict[str, Any]:
    totals = one.totals
    return {
        "version": one.version,
        "digest": one.digest,
        "weight": one.weight,
        "requests": totals.requests,
        "failed": totals.failed,
        "cancelled": totals.cancelled,
        "prompt_tokens": totals.prompt_tokens,
        "generated_tokens": totals.generated_tokens,
        "scored": totals.scored,
        "feedback": _interval(one.feedback),
        "completed": _interval(one.completed),
        "first_token_seconds": _interval(one.first_token),
        "total_seconds": _interval(one.seconds),
    }


def _difference(one: Difference) -> dict[str, Any]:
    return {
        "version": one.version,
        "control": one.control,
        "feedback": _interval(one.feedback),
        "first_token_seconds": _interval(one.first_token),
        "total_seconds": _interval(one.seconds),
    }


def _interval(one: Interval | None) -> Mapping[str, float | None] | None:
    return None if one is None else asdict(one)
