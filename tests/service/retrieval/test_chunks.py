"""Chunks are slices of their document, within the size, under their headings."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.retrieval.chunks import Chunker
from service.retrieval.errors import DocumentRefused
from service.retrieval.passage import Document
from tests.service.retrieval.conftest import make_chunker

TEXT = """# Guide

Some words before. 한국어와 émojis 🙂 too.

## Install

### On Linux

Take the package. Unpack it. Run the program that is in it, and read what it says.

```sh
# not a heading
make all
```

## Use
Start it and wait.
"""


def test_chunks_are_slices_within_the_size(chunker: Chunker) -> None:
    chunks = chunker.cut(Document("guide", TEXT), 24, 0)
    assert len(chunks) > 3
    for chunk in chunks:
        assert TEXT[chunk.start : chunk.stop] == chunk.text
        assert chunk.tokens == chunker.tokens(chunk.text) <= 24
    stops = [chunk.stop for chunk in chunks]
    assert all(stop <= later.start for stop, later in zip(stops, chunks[1:], strict=False))


def test_nothing_but_headings_is_lost(chunker: Chunker) -> None:
    words = set("".join(c.sought for c in chunker.cut(Document("guide", TEXT), 24, 0)).split())
    assert {"package.", "program", "make", "wait.", "한국어와", "Install", "Linux"} <= words


def test_headings_are_those_above_the_text(chunker: Chunker) -> None:
    chunks = chunker.cut(Document("guide", TEXT), 24, 0)
    by_word = {
        w: c.headings for w in ("words", "Unpack", "make", "wait") for c in chunks if w in c.text
    }
    assert by_word["words"] == ("Guide",)
    assert by_word["Unpack"] == by_word["make"] == ("Guide", "Install", "On Linux")
    assert by_word["wait"] == ("Guide", "Use")
    assert not any(c.text.strip().startswith("##") and "\n" not in c.text for c in chunks)


def test_overlap_repeats_the_end(chunker: Chunker) -> None:
    text = " ".join(f"word{i}." for i in range(80))
    chunks = chunker.cut(Document("d", text), 32, 12)
    assert any(b.start < a.stop for a, b in pairwise(chunks))


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_a_document_without_text_is_refused(chunker: Chunker, text: str) -> None:
    with pytest.raises(DocumentRefused, match="no text"):
        chunker.cut(Document("d", text), 32, 0)


def test_a_document_of_headings_is_one_chunk(chunker: Chunker) -> None:
    (chunk,) = chunker.cut(Document("d", "# One\n\n## Two\n"), 32, 0)
    assert chunk.text == "# One\n\n## Two"


@pytest.mark.parametrize("text", ["x" * 40_000, "> " * 10_000, "- a\n  " * 6_000])
def test_a_hostile_text_takes_time_by_its_length(chunker: Chunker, text: str) -> None:
    """Without segments each of these takes minutes."""
    started = time.process_time()
    chunks = chunker.cut(Document("d", text), 192, 0)
    assert time.process_time() - started < 20
    assert sum(len(chunk.text.split()) for chunk in chunks) >= len(text.split())


def test_a_long_document_is_cut_as_a_short_one_is(chunker: Chunker) -> None:
    """A cut between segments is one between paragraphs."""
    paragraph = "Every sentence here is of this kind. " * 6
    text = "\n\n".join(f"## Part {i}\n\n{paragraph}" for i in range(120))
    chunks = chunker.cut(Document("d", text), 192, 0)
    assert all(chunk.text.startswith("## Part") for chunk in chunks)
    assert all(chunk.text.endswith("kind.") for chunk in chunks)


def test_too_long_a_document_is_refused(chunker: Chunker) -> None:
    with pytest.raises(DocumentRefused, match="at most 4194304: split it"):
        chunker.cut(Document("d", "word " * 900_000), 192, 0)


@settings(max_examples=40)
@given(st.text(st.sampled_from("ab .\n#`\r\u2028é한\t"), min_size=1, max_size=200))
def test_any_text_gives_slices_or_a_refusal(text: str) -> None:
    try:
        chunks = CHUNKER.cut(Document("d", text), 16, 0)
    except DocumentRefused:
        return
    for chunk in chunks:
        assert text[chunk.start : chunk.stop] == chunk.text
        assert chunk.text.strip()


CHUNKER = make_chunker()
