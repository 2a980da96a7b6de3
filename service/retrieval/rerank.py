"""A cross-encoder behind a URL: reads the question and each passage together, and scores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from service.retrieval.errors import RerankerFailed

SECONDS = 60.0


class Reranker(Protocol):
    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """One score for each text, in their order. Raises RerankerFailed."""
        ...


class RemoteReranker:
    """A server that takes {"query", "documents"} and answers {"results": [{"index": 0,
    "relevance_score": 0.9}, …]}, as vLLM, Jina and Cohere do."""

    def __init__(
        self, url: str, model: str | None = None, key: str | None = None, transport: Any = None
    ) -> None:
        import httpx

        self._url = url
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(timeout=SECONDS, headers=headers, transport=transport)

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        import httpx

        body: dict[str, Any] = {"query": question, "documents": list(texts), "top_n": len(texts)}
        if self._model:
            body["model"] = self._model
        try:
            reply = self._http.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise RerankerFailed(f"the reranker does not answer: {error!r}") from error
        if reply.status_code != 200:
            raise RerankerFailed(f"the reranker answered HTTP {reply.status_code}")
        try:
            given = {int(r["index"]): float(r["relevance_score"]) for r in reply.json()["results"]}
            scores = [given[place] for place in range(len(texts))]
        except (ValueError, KeyError, TypeError) as error:
            raise RerankerFailed(f"the reranker's reply is no list of scores: {error!r}") from error
        if not all(map(math.isfinite, scores)):
            raise RerankerFailed("the reranker sent a score that is not finite")
        return scores
