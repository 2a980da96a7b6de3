"""The rows of a file, one at a time: no format is read whole, so a file may exceed the memory.

A row has a place to name it by: "file:line", or "file:row n" where the format has no lines.
"""

from __future__ import annotations

import csv
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from adapters.json_fault import slip
from training.data.arrow import dataset_directory, parquet
from training.data.text import TEXTS, passages, raw_files
from training.errors import DataError

Row = Mapping[str, Any]
Found = tuple[str, Row | DataError]
LONGEST_ROW = 64 * 1024 * 1024  # characters
JSON_LINES = (".jsonl", ".ndjson")
SAVED = ("state.json", "dataset_dict.json")  # one of them is in what datasets saved
_CHUNK = 1 << 20
_SPLITS = frozenset(("train", "test", "validation", "valid", "val", "dev", "eval"))
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")


def scan(path: Path, raw: bool = False) -> Iterator[Found]:
    """(place, row) of each row, or (place, why it is none).

    `raw`: a folder is one of raw text, read to any depth. Raises DataError where the file cannot be
    read or nothing after a fault could be trusted.
    """
    try:
        yield from (_raw_folder if raw and _plain_folder(path) else _reader(path))(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_not_utf8(error)}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at {error.start:,}): save it as UTF-8"


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row. Raises DataError at the first one that is none."""
    for place, row in scan(path):
        if isinstance(row, DataError):
            raise row
        yield place, row


def _plain_folder(path: Path) -> bool:
    return path.is_dir() and not any((path / name).is_file() for name in SAVED)


def _raw_folder(path: Path) -> Iterator[Found]:
    for file in raw_files(path, JSON_LINES):
        yield from _reader(file)(file)


def _reader(path: Path) -> Callable[[Path], Iterator[Found]]:
    if path.is_dir():
        return _shards if _plain_folder(path) else dataset_directory
    if path.suffix.lower() in TEXTS:
        return passages
    try:
        return READERS[path.suffix.lower()]
    except KeyError:
        known = ", ".join([*(suffix for suffix in READERS if suffix), *TEXTS])
        raise DataError(
            f"{path}: {path.suffix} is not known; one of {known}, a folder of these, or one that "
            "datasets.save_to_disk wrote, is needed"
        ) from None


def _shards(path: Path) -> Iterator[Found]:
    """The files of a folder by name, as one. Raises DataError where they may not belong together:
    a test file that slips into the training data spoils what is measured later."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and p.suffix)
    if not files:
        raise DataError(
            f"{path}: a folder without state.json and without files of data; "
            "data.raw=true reads one of .txt and .md"
        )
    names = [re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0] for file in files]
    splits = sorted({name for name in names if name in _SPLITS})
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or len(splits) > 1 or (splits and set(names) != set(splits)):
        listed = ", ".join(file.name for file in files[:8])
        raise DataError(f"{path}: {listed}: more than one kind or split; name one file")
    for file in files:
        yield from _reader(file)(file)


def _json_lines(path: Path) -> Iterator[Found]:
    begun = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            place = f"{path}:{number}"
            first, begun = not begun, True
            if first and raw.lstrip()[:1] == b"[":
                raise DataError(f"{path}: a JSON array: name it .json, or have a row on each line")
            try:
                yield place, _object(place, json.loads(raw.decode("utf-8-sig").rstrip()))
            except json.JSONDecodeError as error:
                why = f"{slip(error)}, column {error.colno}"
                yield place, DataError(f"{place}: not JSON: {why}")
            except UnicodeDecodeError as error:
                if number == 1 and raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                    raise DataError(f"{path}: UTF-16: save it as UTF-8") from None
                yield place, DataError(f"{place}: {_not_utf8(error)}")
            except (ValueError, RecursionError) as error:
                yield place, DataError(f"{place}: not JSON: {error}")


def _object(place: str, value: Any) -> Row | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"{place}: an object is needed, this is a {type(value).__name__}")


def _json(path: Path) -> Iterator[Found]:
    """The elements of one array. A fault in its notation ends it: where is the next element?

    Where no array begins the file may be JSON Lines by another name, as many data sets have it.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        window = _Window(path, file)
        if window.sign() == "{":
            yield from _json_lines(path)
            return
        if window.sign() != "[":
            what = "an array of objects, or an object in each line, is needed"
            raise DataError(f"{path}:{window.line}: {what}")
        window.skip()
        number, sign = 0, window.sign()
        while sign != "]":
            number += 1
            place = f"{path}:{window.line}, item {number}"
            yield place, _object(place, window.value())
            sign = window.sign()
            if sign == ",":
                window.skip()
                window.sign()
            elif sign != "]":
                raise DataError(f"{path}:{window.line}: {sign!r} after item {number}, not , or ]")
        window.skip()
        if sign := window.sign():
            raise DataError(f"{path}:{window.line}: {sign!r} after the array, which would be lost")


class _Window:
    """What has been read of a JSON text and not yet been parsed."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line = "", 0, 1

    def sign(self) -> str:
        """The next character that is not blank, which stays; "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self._go_to(blank.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def skip(self) -> None:
        self.at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError:
                raise DataError(f"{self.path}:{self.line}: nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self.text) - self.at <= LONGEST_ROW and self._grow():
                    continue
                line = self.line + self.text.count("\n", self.at, error.pos)
                raise DataError(f"{self.path}:{line}: not JSON: {error.msg}") from None
            self._go_to(end)
            return value

    def _go_to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _grow(self) -> bool:
        """Read on, twice as far each time; what has been parsed is dropped."""
        rest = self.text[self.at :]
        more = self.file.read(max(_CHUNK, len(rest)))
        self.text, self.at = rest + more, 0
        return bool(more)


def _csv(path: Path, delimiter: str) -> Iterator[Found]:
    """The first line names the columns. A field in quotation marks may hold line breaks."""
    csv.field_size_limit(LONGEST_ROW)  # of the whole process; the default refuses long documents
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: {error}") from None
        if not all(header) or len(set(header)) < len(header):
            raise DataError(f"{path}:1: columns {header}; each needs a name of its own")
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = DataError(f"{place}: {error}")
                if "end of data" in str(error):  # an open quotation mark took all that follows
                    raise fault from None
                yield place, fault
                continue
            if cells:
                yield place, _record(place, header, cells)


def _record(place: str, header: list[str], cells: list[str]) -> Row | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError(f"{place}: {len(cells)} fields, the header has {len(header)}: {header}")


READERS: Mapping[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": parquet,
    "": _json_lines,
}
