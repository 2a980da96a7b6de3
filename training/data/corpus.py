"""Corpus: many examples as one sequence, their tokens on disk once they are many.

A row is tokenised once, when it is checked; training then reads tokens, in any order, at the same
cost whatever format they came from. In memory stay some 24 bytes for each example.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import overload

from training.data.encoding import Example

IN_MEMORY = 16 * 1024 * 1024  # tokens, of four bytes each
_WIDTH = array("i").itemsize


def _begun() -> blake2b:
    return blake2b(digest_size=16)


def _note(found: blake2b, example: Example) -> None:
    tokens = array("i", example.tokens)
    found.update(array("i", (len(tokens), example.answer_start)).tobytes())
    found.update(tokens.tobytes())


def digest_of(data: Sequence[Example]) -> str:
    """The digest of any sequence of examples, as a corpus keeps its own."""
    if isinstance(data, Corpus):
        return data.digest
    found = _begun()
    for example in data:
        _note(found, example)
    return found.hexdigest()


class Corpus(Sequence[Example]):
    """Examples, in the order they were appended. The file has no name, so nothing is left of it.

    It lies where `tempfile` puts it: set TMPDIR where that is small or in memory.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._file: int | None = None  # its descriptor
        self._written = 0  # tokens that are in the file
        self._rest = array("i")  # those after them
        self._ends = array("q", [0])  # example i is tokens ends[i] to ends[i + 1]
        self._answers = array("i")
        self._hash = _begun()

    def append(self, example: Example) -> None:
        self._rest.extend(example.tokens)
        self._ends.append(self._ends[-1] + len(example.tokens))
        self._answers.append(example.answer_start)
        _note(self._hash, example)
        if len(self._rest) > self._in_memory:
            self._spill()

    @property
    def digest(self) -> str:
        """Of all examples in their order: is it the data that a run began with?"""
        return self._hash.hexdigest()

    @property
    def in_memory(self) -> int:
        """Tokens that are in memory."""
        return len(self._rest)

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    @property
    def loss_tokens(self) -> int:
        return self.tokens - sum(self._answers)

    def length(self, index: int) -> int:
        """Tokens of an example, which is not read for it."""
        return self._ends[index + 1] - self._ends[index]

    def __len__(self) -> int:
        return len(self._answers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        return Example(tuple(self._tokens(start, end)), self._answers[index])

    def _tokens(self, start: int, end: int) -> array[int]:
        """No example lies on both sides of `_written`: they are spilled whole."""
        if start >= self._written:
            return self._rest[start - self._written : end - self._written]
        assert self._file is not None
        found = array("i")
        found.frombytes(os.pread(self._file, (end - start) * _WIDTH, start * _WIDTH))
        return found

    def _spill(self) -> None:
        if self._file is None:
            self._file, name = tempfile.mkstemp(prefix="nibble-tokens-")
            os.unlink(name)
            weakref.finalize(self, os.close, self._file)
        with open(self._file, "wb", closefd=False) as file:
            file.write(self._rest)
        self._written += len(self._rest)
        self._rest = array("i")


def length_of(data: Sequence[Example], index: int) -> int:
    """Tokens of `data[index]`."""
    return data.length(index) if isinstance(data, Corpus) else len(data[index].tokens)
