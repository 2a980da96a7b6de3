"""The child of `service.retrieval.parsing`: reads files under limits, one line of JSON for each.

Only the parser of the format that a file's name promises sees it: nothing guesses, so a renamed
archive is never opened.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MEMORY_EXIT = 77
MAX_REASON = 200  # characters of a parser's own words


class Refusal(Exception):
    """This file cannot be read; the message says why."""


def main() -> None:
    """Read one question from stdin, write one line for each of its files to stdout."""
    question = json.load(sys.stdin.buffer)
    limits = question["limits"]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints is no answer
    _confine(limits, len(question["files"]))
    for name, path, kind in question["files"]:
        _renew(limits["cpu_seconds"])
        try:
            answer = _answer(name, Path(path), kind, limits)
        except MemoryError:
            os._exit(MEMORY_EXIT)
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


def _answer(name: str, path: Path, kind: str, limits: dict[str, Any]) -> dict[str, Any]:
    try:
        documents = PARSERS[kind](name, path.read_bytes(), limits)
    except Refusal as error:
        return {"refused": str(error)}
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    except MemoryError:
        raise
    except RecursionError:
        return {"refused": f"it is nested too deeply for a {kind} file"}
    except Exception as error:  # a parser on a stranger's bytes: anything may come
        what = f"{type(error).__name__}: {str(error)[:MAX_REASON]}"
        return {"refused": f"it cannot be read as {kind}: {what}"}
    size = sum(len(one["text"]) for one in documents)
    if size > limits["max_characters"]:
        return {"refused": f"{size} characters of text; at most {limits['max_characters']}"}
    if any("\0" in one["text"] for one in documents):
        return {"refused": "there is a NUL character in it: it is no text"}
    return {"documents": documents}


def _confine(limits: dict[str, Any], files: int) -> None:
    """Nothing of a stranger's has been looked at when this runs."""
    _cap(resource.RLIMIT_AS, limits["memory_bytes"])
    _cap(resource.RLIMIT_CPU, files * (limits["cpu_seconds"] + 1))
    _cap(resource.RLIMIT_FSIZE, 0)
    _cap(resource.RLIMIT_NOFILE, 64)
    _cap(resource.RLIMIT_CORE, 0)


def _cap(what: int, amount: int) -> None:
    """Set a limit, never above the one that is there already."""
    hard = resource.getrlimit(what)[1]
    most = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(what, (most, most))


def _renew(seconds: int) -> None:
    """Give the next file its processor time, counted from what is used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(used.ru_utime + used.ru_stime) + seconds
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


# One parser for each format ----------------------------------------------------------------------


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"it is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _text(name: str, data: bytes, limits: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": name, "text": _decoded(data), "metadata": {}}]


def _jsonl(name: str, data: bytes, limits: dict[str, Any]) -> list[dict[str, Any]]:
    """A document for each row that is not empty: {"text": …, "id": …, "metadata": {…}}."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(_decoded(data).splitlines(), 1):
        if not line.strip():
            continue
        if len(found) == limits["max_rows"]:
            raise Refusal(f"more than {limits['max_rows']} rows")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Refusal(f"line {number} is not JSON: {error}") from None
        found.append(_row(row, f"{name}#{number}", number))
    return found


def _row(row: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise Refusal(f'line {number} should be an object with "text"')
    if extra := sorted(row.keys() - {"id", "text", "metadata"}):
        raise Refusal(f"line {number}: there is no field {extra[0][:60]!r}; text, id, metadata are")
    given, metadata = row.get("id", name), row.get("metadata") or {}
    if not isinstance(given, str) or not given:
        raise Refusal(f"line {number}: id should be text")
    if not isinstance(metadata, dict):
        raise Refusal(f"line {number}: metadata should be an object")
    return {"id": given, "text": row["text"], "metadata": metadata}


def _converted(converter: str, suffix: str, magic: bytes = b"") -> Callable[..., Any]:
    """A parser through markitdown's converter of that name."""

    def parse(name: str, data: bytes, limits: dict[str, Any]) -> list[dict[str, Any]]:
        if not data.startswith(magic):
            raise Refusal(f"it is no {suffix} file: it does not begin like one")
        if not magic:
            _decoded(data)
        from markitdown import StreamInfo, converters

        file: BinaryIO = io.BytesIO(data)
        info = StreamInfo(extension=suffix, charset="utf-8" if not magic else None)
        text = getattr(converters, converter)().convert(file, info).markdown
        if not text.strip():
            scanned = " (a scan? there is no text recognition here)" if suffix == ".pdf" else ""
            raise Refusal(f"there is no text in it{scanned}")
        return [{"id": name, "text": text, "metadata": {}}]

    return parse


PARSERS: dict[str, Callable[[str, bytes, dict[str, Any]], list[dict[str, Any]]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "html": _converted("HtmlConverter", ".html"),
    "csv": _converted("CsvConverter", ".csv"),
    "pdf": _converted("PdfConverter", ".pdf", b"%PDF-"),
    "docx": _converted("DocxConverter", ".docx", b"PK\x03\x04"),
}
