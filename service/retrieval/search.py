"""One question to a collection: dense, lexical, or both fused; then spread out, reranked, cut off.

Reciprocal rank fusion: score(p) = Σ over rankings of 1 / (60 + rank of p), here divided by its
largest value, so that a passage which leads both rankings has 1 (Cormack et al., SIGIR 2009).
Maximal marginal relevance: of what is left, take argmax (1 - d) · score - d · max similarity to
what was taken, with scores brought to 0…1 (Carbonell and Goldstein, SIGIR 1998).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from service.retrieval.collection import Collection, Found
from service.retrieval.embedding import Embedder
from service.retrieval.fields import Group
from service.retrieval.passage import Passage
from service.retrieval.rerank import Reranker

Mode = Literal["dense", "lexical", "hybrid"]

MAX_K = 100
MAX_QUESTION = 8192  # characters that search reads
FUSION = 60
DEPTH = 4  # candidates of each ranking for every passage that is wanted
LEAST_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Question:
    """What to look for, and how."""

    text: str
    k: int = 4
    mode: Mode = "hybrid"
    where: Group | None = None
    min_score: float | None = None  # in the mode's own scores
    diversity: float = 0.0  # 0: by score alone
    rerank: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The best passages first, and the seconds that each step took."""

    passages: tuple[Passage, ...]
    timings: dict[str, float]


def search(
    collection: Collection,
    question: Question,
    embedder: Embedder,
    reranker: Reranker | None = None,
) -> Answer:
    """The passages of `collection` for a question; the same question finds the same ones.

    The caller has checked that the embedder is the collection's where `mode` needs one. Raises
    EmbedderFailed, CollectionUnavailable, RerankerFailed.
    """
    clock = _Clock()
    text = question.text[:MAX_QUESTION]
    many = question.diversity > 0 or question.rerank or question.mode == "hybrid"
    depth = max(DEPTH * question.k, LEAST_DEPTH) if many else question.k
    dense: list[Found] = []
    lexical: list[Found] = []
    if question.mode != "lexical":
        vector = embedder.embed([text])[0]
        clock.lap("embed")
        dense = collection.dense(vector, depth, question.where)
        clock.lap("dense")
    if question.mode != "dense":
        lexical = collection.lexical(text, depth, question.where)
        clock.lap("lexical")
    found = _scored(dense, lexical, question.mode)
    if question.min_score is not None:
        found = [one for one in found if one.passage.score >= question.min_score]
    if question.rerank and reranker is not None and found:
        found = _reranked(found[:depth], text, reranker)
        clock.lap("rerank")
    if question.diversity > 0:
        found = spread(found[:depth], question.k, question.diversity)
    return Answer(tuple(one.passage for one in found[: question.k]), clock.laps)


def _scored(dense: Sequence[Found], lexical: Sequence[Found], mode: Mode) -> list[Found]:
    if mode == "hybrid":
        return fused(dense, lexical)
    if mode == "dense":
        return [_with(one, dense=one.passage.score) for one in dense]
    return [_with(one, lexical=one.passage.score) for one in lexical]


def fused(dense: Sequence[Found], lexical: Sequence[Found]) -> list[Found]:
    """Two rankings as one, by the ranks alone; ties by place."""
    merged: dict[tuple[str, int], Found] = {}
    scores: dict[tuple[str, int], float] = {}
    best = 2 / (FUSION + 1)
    for ranking, name in ((dense, "dense"), (lexical, "lexical")):
        for rank, one in enumerate(ranking, 1):
            place = one.passage.place
            known = merged.get(place, one)
            merged[place] = _with(known, **{name: one.passage.score})
            scores[place] = scores.get(place, 0.0) + 1 / (FUSION + rank) / best
    whole = [_with(one, score=scores[place]) for place, one in merged.items()]
    return sorted(whole, key=lambda one: (-one.passage.score, one.passage.place))


def spread(found: Sequence[Found], k: int, diversity: float) -> list[Found]:
    """The first k by maximal marginal relevance."""
    import numpy as np

    left = list(found)
    scores = [one.passage.score for one in left]
    low, width = min(scores, default=0.0), (max(scores, default=0.0) - min(scores, default=0.0))
    relevance = {
        one.passage.place: (one.passage.score - low) / width if width else 1.0 for one in left
    }
    taken: list[Found] = []
    while left and len(taken) < k:

        def worth(one: Found) -> float:
            near = max((float(np.dot(one.vector, other.vector)) for other in taken), default=0.0)
            return (1 - diversity) * relevance[one.passage.place] - diversity * near

        best = max(left, key=worth)
        left.remove(best)
        taken.append(best)
    return taken


def _reranked(found: Sequence[Found], question: str, reranker: Reranker) -> list[Found]:
    scores = reranker.scores(question, [one.passage.text for one in found])
    scored = [
        _with(one, score=score, rerank=score) for one, score in zip(found, scores, strict=True)
    ]
    return sorted(scored, key=lambda one: (-one.passage.score, one.passage.place))


def _with(one: Found, **changes: float) -> Found:
    return replace(one, passage=replace(one.passage, **changes))  # type: ignore[arg-type]


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 6)
        self._last = now
