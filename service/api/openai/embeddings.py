"""`POST /v1/embeddings`: the base's own states, with an adapter if one is named.

The vector of a text is the hidden state of its last token behind the last norm, which is what the
model predicts from, scaled to length 1. The base is no embedding model: without an adapter that was
trained for it, near texts get near vectors, and no more than that is promised.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from service.api.access import Guarded, needs
from service.api.deps import Desk, DeskDep, Serving, ServingDep, unless_gone
from service.api.intake import Order, Started, client_key, start
from service.api.openai.completions import Prompts, split
from service.api.openai.replies import EmbeddingList
from service.api.openai.running import outcomes
from service.api.openai.schema import Lenient, ModelName
from service.api.openai.served import EMBEDDED, model_errors, terms_of
from service.api.openai_errors import openai_refusals
from service.engine.request import Finished, Sampling

router = APIRouter(prefix="/v1", tags=["openai"], route_class=Guarded)


class EmbeddingBody(Lenient):
    """Texts or token ids, and the form of the vectors. Unknown fields are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "mini", "input": ["two boats", "one harbour"]},
                {"model": "mini", "input": "two boats", "encoding_format": "float"},
            ]
        }
    )

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] = Field(
        default="base64", description="base64 holds float32, the first number first."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=1 << 16, description="The first so many, scaled to length 1 again."
    )
    user: str | None = Field(default=None, max_length=256)


@router.post(
    "/embeddings",
    responses={
        200: {"model": EmbeddingList},
        **openai_refusals(404, 408, 413, 415, 422, 429, 500, 503),
    },
)
@needs("infer", queues=True)
async def embeddings(
    body: EmbeddingBody, request: Request, desk: DeskDep, serving: ServingDep
) -> Response:
    """A vector for each text."""
    return await unless_gone(request, _embedded(body, request, desk, serving))


async def _embedded(
    body: EmbeddingBody, request: Request, desk: Desk, serving: Serving
) -> Response:
    terms = terms_of(body.model, desk, serving)
    client = client_key(body.user, request)
    request_id: str = request.scope["request_id"]
    with ExitStack() as held, model_errors(body.model):
        started: list[Started] = []
        for place, prompt in enumerate(split(body.input)):
            order = Order(
                prompt=prompt,
                sampling=Sampling(ignore_eos=True),
                terms=terms,
                client=client,
                max_new_tokens=1,
                pooled=True,
                names=EMBEDDED,
                streamed=False,
            )
            own_id = f"{request_id}-{place}" if place else request_id
            one = await start(order, own_id, desk, serving)
            held.callback(one.close)
            started.append(one)
        ends = [(await outcomes(one))[0].closed for one in started]
    return JSONResponse(_reply(body, ends), headers=dict(started[0].headers))


def _reply(body: EmbeddingBody, ends: Sequence[Finished]) -> dict[str, Any]:
    tokens = sum(end.prompt_tokens for end in ends)
    data = [
        {"object": "embedding", "index": place, "embedding": _vector(body, end.hidden)}
        for place, end in enumerate(ends)
    ]
    return {
        "object": "list",
        "model": body.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(body: EmbeddingBody, hidden: Sequence[float]) -> list[float] | str:
    vector = np.asarray(hidden, dtype=np.float64)[: body.dimensions]
    vector = vector / max(float(np.linalg.norm(vector)), 1e-30)
    if body.encoding_format == "float":
        return [float(value) for value in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
