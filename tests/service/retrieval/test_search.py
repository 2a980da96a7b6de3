"""Fusion, spreading, cutting off: each against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.retrieval.collection import Collection, Found
from service.retrieval.errors import RerankerFailed
from service.retrieval.library import Library
from service.retrieval.passage import Document, Passage
from service.retrieval.rerank import RemoteReranker
from service.retrieval.search import Question, fused, search, spread
from tests.service.retrieval.conftest import add, make_library


def found(name: str, score: float, vector: Sequence[float] = (1.0, 0.0)) -> Found:
    passage = Passage(name, 0, "", name, 0, len(name), 1, score)
    return Found(passage, np.array(vector, dtype=np.float32))


def names(ranking: Sequence[Found]) -> list[str]:
    return [one.passage.document for one in ranking]


def test_fusion_is_by_ranks_alone() -> None:
    dense = [found("a", 0.9), found("b", 0.8), found("c", 0.1)]
    lexical = [found("b", 70.0), found("d", 2.0), found("a", 1.0)]
    both = fused(dense, lexical)
    assert names(both) == ["b", "a", "d", "c"]
    scores = {one.passage.document: one.passage.score for one in both}
    assert scores["b"] == pytest.approx((1 / 62 + 1 / 61) / (2 / 61))
    assert scores["a"] == pytest.approx((1 / 61 + 1 / 63) / (2 / 61))
    assert scores["c"] == pytest.approx((1 / 63) / (2 / 61))
    by_name = {one.passage.document: one.passage for one in both}
    assert (by_name["b"].dense, by_name["b"].lexical) == (0.8, 70.0)
    assert (by_name["d"].dense, by_name["d"].lexical) == (None, 2.0)


def test_ties_are_settled_by_place() -> None:
    assert names(fused([found("b", 1), found("a", 1)], [found("a", 1), found("b", 1)])) == [
        "a",
        "b",
    ]


def test_spreading_leaves_out_the_second_of_twins() -> None:
    ranking = [
        found("a", 1.0, (1, 0)),
        found("twin", 0.99, (1, 0)),
        found("other", 0.6, (0, 1)),
        found("far", 0.0, (0, 1)),
    ]
    assert names(spread(ranking, 2, 0.0)) == ["a", "twin"]
    assert names(spread(ranking, 2, 0.5)) == ["a", "other"]
    assert names(spread(ranking, 9, 1.0))[:2] == ["a", "other"]
    assert len(spread(ranking, 9, 1.0)) == 4
    assert spread([], 3, 0.5) == []


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, Collection]:
    place: Path = tmp_path_factory.mktemp("search")
    library = make_library(place)
    collection = library.shelf("default").create("towns")
    documents = [
        Document(f"t{i}", f"Town number{i} lies by river{i}. It has a mill.") for i in range(30)
    ]
    add(library, "towns", *documents)
    return library, collection


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_every_mode_finds_it_and_says_how(towns: tuple[Library, Collection], mode: str) -> None:
    library, collection = towns
    question = Question("Which river? river7 number7", 3, mode)  # type: ignore[arg-type]
    answer = search(collection, question, library.embedder)
    first = answer.passages[0]
    assert first.document == "t7"
    assert len(answer.passages) == (1 if mode == "lexical" else 3)
    assert (first.dense is not None) == (mode != "lexical")
    assert (first.lexical is not None) == (mode != "dense")
    assert (
        set(answer.timings)
        == {
            "dense": {"embed", "dense"},
            "lexical": {"lexical"},
            "hybrid": {"embed", "dense", "lexical"},
        }[mode]
    )
    again = search(collection, question, library.embedder)
    assert again.passages == answer.passages


def test_a_least_score_cuts_off(towns: tuple[Library, Collection]) -> None:
    library, collection = towns
    question = Question("river7", 20, "lexical", min_score=2.0)
    answer = search(collection, question, library.embedder)
    assert [passage.document for passage in answer.passages] == ["t7"]
    assert not search(collection, Question("nothingofit", 5, "lexical"), library.embedder).passages


def test_a_reranker_has_the_last_word(towns: tuple[Library, Collection]) -> None:
    library, collection = towns

    def reply(request: httpx.Request) -> httpx.Response:
        import json

        asked = json.loads(request.content)
        results = [
            {"index": i, "relevance_score": float("river21" in text)}
            for i, text in enumerate(asked["documents"])
        ]
        return httpx.Response(200, json={"results": results[::-1]})

    reranker = RemoteReranker("http://r/rerank", transport=httpx.MockTransport(reply))
    question = Question("town river7 mill number21", 2, "hybrid", rerank=True)
    answer = search(collection, question, library.embedder, reranker)
    assert answer.passages[0].document == "t21"
    assert answer.passages[0].rerank == answer.passages[0].score == 1.0
    assert "rerank" in answer.timings


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(500),
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, json=[]),
        httpx.Response(200, text="no"),
    ],
)
def test_a_reranker_that_fails_says_so(reply: httpx.Response) -> None:
    reranker = RemoteReranker("http://r", transport=httpx.MockTransport(lambda _: reply))
    with pytest.raises(RerankerFailed, match="reranker"):
        reranker.scores("q", ["a"])
