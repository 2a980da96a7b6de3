"""Documents to chunks: along their structure, sized in the base's tokens, with places kept.

The splitter cuts Markdown where it hurts least: between sections, then paragraphs, sentences,
words. What it returns is a slice of the document, so offsets and text always agree.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from service.retrieval.errors import DocumentRefused, installed
from service.retrieval.passage import Chunk, Document

MIN_TOKENS = 16
MAX_TOKENS = 4096
DEFAULT_TOKENS = 192
MAX_CHUNKS = 100_000  # of one document
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
        # A copy: the splitter reads truncation settings, and ours must not change under it.
        backend = tokenizer.backend_tokenizer
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()

    def tokens(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def cut(self, document: Document, size: int, overlap: int) -> list[Chunk]:
        """Chunks of at most `size` tokens of the base, neighbours sharing up to `overlap`.

        Raises DocumentRefused when there is no text in it, or far too much.
        """
        splitters = installed("semantic_text_splitter")
        splitter = splitters.MarkdownSplitter.from_huggingface_tokenizer(
            self._backend, size, overlap=overlap
        )
        text = document.text
        headings = _headings(text)
        chunks: list[Chunk] = []
        for start, piece in splitter.chunk_indices(text):
            stop = start + len(piece)
            if not piece.strip() or _only_headings(headings, start, stop, text):
                continue  # its words stand above the chunks that follow
            if len(chunks) == MAX_CHUNKS:
                raise DocumentRefused(document.id, f"more than {MAX_CHUNKS} passages; split it")
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
