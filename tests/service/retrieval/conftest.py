"""A library on a directory of the test, with a fake embedding model small enough to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer

from base.mini import MINI
from service.retrieval.chunks import Chunker
from service.retrieval.ingest import Event, ingest
from service.retrieval.library import Library
from service.retrieval.passage import Document

if TYPE_CHECKING:
    from service.retrieval.embedding import Vectors

pytest.importorskip("lancedb", reason="needs the extra rag")
pytest.importorskip("semantic_text_splitter", reason="needs the extra rag")

WIDTH = 64


class WordEmbedder:
    """A bag of words, each hashed to one of 64 places: texts that share words are near."""

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.asked = 0  # texts

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += len(texts)
        rows = np.full((len(texts), WIDTH), 1e-3, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[sha256(word.encode()).digest()[0] % WIDTH] += 1
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def make_chunker() -> Chunker:
    tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    return Chunker(SimpleNamespace(backend_tokenizer=tokenizer))


def make_library(place: Path, embedder: WordEmbedder | None = None) -> Library:
    return Library(place.as_uri(), embedder or WordEmbedder(), make_chunker())


@pytest.fixture(scope="session")
def chunker() -> Chunker:
    return make_chunker()


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return make_library(tmp_path / "collections")


def add(library: Library, name: str, *documents: Document, tenant: str = "default") -> list[Event]:
    """Ingest into a collection of the library."""
    collection = library.shelf(tenant).collection(name)
    return list(ingest(collection, documents, library.chunker, library.embedder))
