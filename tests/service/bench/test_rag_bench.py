"""`nibble rag bench`: a run that was stopped goes on, and its figures are of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from service.bench import rag_bench
from service.retrieval import ingest
from tests.service.retrieval.conftest import WordEmbedder


class Stopped(Exception):
    pass


class Counting(WordEmbedder):
    """Counts the texts of batches, and stops the run when there are more than `most`."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.most, self.embedded = most, 0

    def embed(self, texts: Any) -> Any:
        if len(texts) > 1:  # one alone is a question, or asks how wide a vector is
            self.embedded += len(texts)
        if self.embedded > self.most:
            raise Stopped
        return super().embed(texts)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = tmp_path / "bench"
    monkeypatch.setattr(ingest, "COMMIT_CHUNKS", 20)
    monkeypatch.setattr(rag_bench, "COMMIT", 10)

    def run(embedder: WordEmbedder) -> dict[str, Any]:
        monkeypatch.setattr(rag_bench, "open_embedder", lambda source: embedder)
        vectors = rag_bench._RandomEmbedder
        monkeypatch.setattr(vectors, "embed", lambda self, texts: WordEmbedder().embed(texts))
        return rag_bench.run([30], 60, 10, Progress(disable=True), keep)

    with pytest.raises(Stopped):
        run(Counting(45))
    noted = json.loads((keep / "ingest.json").read_text())["60"]
    assert noted["chunks"] == 40, "two commits of two documents are there, the third is not"
    last = Counting()
    found = run(last)
    assert found["ingest"]["chunks"] == 60
    assert found["ingest"]["seconds"] >= round(noted["seconds"], 2)
    assert found["queries"][0]["chunks"] == 30
    assert {"dense", "lexical", "hybrid", "rss"} < set(found["queries"][0])
    assert last.embedded == 20, "only what was missing"
    again = Counting()
    assert run(again)["ingest"]["chunks"] == 60
    assert again.embedded == 0
