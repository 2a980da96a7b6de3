"""Raw text as rows: files of .txt and .md, and folders of these and of JSON Lines, to any depth.

A long file is many rows, each of some pages, so that it is never read whole. They are cut at blank
lines where there are any, nothing is lost between them, and all but the last say that they go on,
so that no stop token is learnt in the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from training.errors import DataError

Found = tuple[str, Mapping[str, Any] | DataError]
TEXTS = (".txt", ".md")
PASSAGE = 32_000  # characters, after which the next blank line ends one
LONGEST = 4 * PASSAGE  # where there is none, the end of a line does, or this


def passages(path: Path) -> Iterator[Found]:
    """("file:line", {"text": …, "continues": …}) of each passage."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            held: tuple[int, str] | None = None
            for line, text in _cut(file):
                if held is not None:
                    yield f"{path}:{held[0]}", {"text": held[1], "continues": True}
                held = (line, text)
            if held is not None:
                yield f"{path}:{held[0]}", {"text": held[1], "continues": False}
    except UnicodeDecodeError as error:
        yield str(path), DataError(f"{path}: not a text in UTF-8: {error}")


def _cut(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line where it begins, passage); blank ones go along with the passage before."""
    parts: list[str] = []
    size, line, begun = 0, 1, 1
    while read := file.readline(LONGEST - size):
        parts.append(read)
        size += len(read)
        line += read.endswith("\n")
        blank = not read.strip()
        if size >= LONGEST or (size >= PASSAGE and (blank or size >= LONGEST // 2)):
            text = "".join(parts)
            if text.strip():
                yield begun, text
            parts, size, begun = [], 0, line
    if (text := "".join(parts)).strip():
        yield begun, text


def raw_files(folder: Path, also: tuple[str, ...]) -> list[Path]:
    """The texts below a folder, and the files whose names end in one of `also`, by path.

    What is hidden is left out. Raises DataError where there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (*TEXTS, *also)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder}: no file below it ends in {', '.join((*TEXTS, *also))}")
    return found
