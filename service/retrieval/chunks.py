"""Documents to chunks: along their structure, sized in the base's tokens, with places kept.

The splitter cuts Markdown where it hurts least: between sections, then paragraphs, sentences,
words. What it returns is a slice of the document, so offsets and text always agree.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.retrieval.errors import CollectionUnavailable, DocumentRefused, installed
from service.retrieval.passage import Chunk, Document

MIN_TOKENS = 16
MAX_TOKENS = 4096
DEFAULT_TOKENS = 192
MAX_CHARACTERS = 4 << 20  # of one document
SEGMENT = 8192  # characters that the splitter sees at once
_BREAKS = (("\n#", 1), ("\n\n", 2), ("\n", 1), (" ", 1))  # and how much of each stays before it
MAX_HEADING = 160  # characters of one heading that are kept

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*")
_FENCE = re.compile(r" {0,3}(```|~~~)")


@dataclass(frozen=True, slots=True)
class _Heading:
    start: int
    stop: int
    above: tuple[str, ...]  # itself last


class Chunker:
    """Cuts documents with the base's tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: the base's, of transformers, backed by the tokenizers library."""
        self._tokenizer = tokenizer

    @cached_property
    def _backend(self) -> Any:
        """A copy, made when it is needed: truncation that is set on the base's changes no chunk."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CollectionUnavailable(
                "the base's tokenizer is written in Python; documents are cut with fast ones only"
            )
        copy = type(backend).from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy

    def tokens(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def cut(self, document: Document, size: int, overlap: int) -> list[Chunk]:
        """Chunks of at most `size` tokens of the base, neighbours sharing up to `overlap`.

        Raises DocumentRefused when there is no text in it, or far too much.
        """
        if len(document.text) > MAX_CHARACTERS:
            raise DocumentRefused(
                document.id,
                f"{len(document.text)} characters; at most {MAX_CHARACTERS}: split it",
            )
        splitters = installed("semantic_text_splitter")
        splitter = splitters.MarkdownSplitter.from_huggingface_tokenizer(
            self._backend, size, overlap=overlap
        )
        text = document.text
        headings = _headings(text)
        chunks: list[Chunk] = []
        pieces = (
            (first + start, piece)
            for first, last in _segments(text)
            for start, piece in splitter.chunk_indices(text[first:last])
        )
        for start, piece in pieces:
            stop = start + len(piece)
            if not piece.strip() or _only_headings(headings, start, stop, text):
                continue  # its words stand above the chunks that follow
            above = _above(headings, start, stop)
            chunks.append(Chunk(piece, start, stop, above, self.tokens(piece)))
        if not chunks and text.strip():  # a document of nothing but headings
            whole = text.strip()
            start = text.index(whole)
            if self.tokens(whole) <= size:
                chunks.append(Chunk(whole, start, start + len(whole), (), self.tokens(whole)))
        if not chunks:
            raise DocumentRefused(document.id, "there is no text in it")
        return chunks


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """Parts of at most SEGMENT characters, cut before a heading, or after a paragraph, line, word.

    The splitter's time grows with the square of what it finds no break in, and it lets no other
    thread work meanwhile.
    """
    start = 0
    while len(text) - start > SEGMENT:
        low, high = start + SEGMENT // 2, start + SEGMENT
        found = ((text.rfind(mark, low, high), kept) for mark, kept in _BREAKS)
        stop = next((at + kept for at, kept in found if at > 0), high)
        yield start, stop
        start = stop
    yield start, len(text)


def _headings(text: str) -> list[_Heading]:
    """Markdown's `#` headings by place, each with those that it stands under."""
    found: list[_Heading] = []
    path: list[tuple[int, str]] = []
    fence = ""
    at = 0
    for line in text.splitlines(keepends=True):
        start, at = at, at + len(line)
        bare = line.rstrip("\r\n")
        if mark := _FENCE.match(bare):
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and (match := _HEADING.fullmatch(bare)):
            level, title = len(match[1]), match[2].strip()[:MAX_HEADING]
            path = [(above, name) for above, name in path if above < level]
            if title:
                path.append((level, title))
            found.append(_Heading(start, start + len(bare), tuple(name for _, name in path)))
    return found


def _above(headings: list[_Heading], start: int, stop: int) -> tuple[str, ...]:
    """The headings in force where the chunk's first words stand that are no heading themselves."""
    at = bisect_right(headings, start, key=lambda heading: heading.start)
    above = headings[at - 1].above if at else ()
    if at and headings[at - 1].start == start:
        start = headings[at - 1].stop + 1
    while at < len(headings) and headings[at].start <= start < stop:
        above, start = headings[at].above, headings[at].stop + 1
        at += 1
    return above


def _only_headings(headings: list[_Heading], start: int, stop: int, text: str) -> bool:
    """Whether a chunk has no words of its own below its headings."""
    at = start
    for heading in headings[bisect_right(headings, start, key=lambda heading: heading.stop) :]:
        if heading.start >= stop or text[at : heading.start].strip():
            break
        at = heading.stop
    return not text[at:stop].strip()
