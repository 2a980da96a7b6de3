"""Rows of Parquet files and of the directories that Hugging Face's `datasets` saves.

A saved dataset is Arrow streams beside a `state.json` that lists them, so pyarrow alone reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.errors import DataError

_ROWS = 256  # that are Python objects at one time


def parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:row n", row), with columns that are null left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(path, file.iter_batches(batch_size=_ROWS))
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}") from None


def dataset_directory(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one split, as `Dataset.save_to_disk` wrote it.

    Raises DataError for a DatasetDict: which split is meant is never guessed, since a test split
    that slips into the training data spoils what is measured later.
    """
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(map(str, _json(path / "dataset_dict.json").get("splits", [])))
        raise DataError(f"{path} holds the splits {splits}: name one of these folders")
    state = _json(path / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: rows are chosen by an index; save flatten_indices() of it")
    for entry in state.get("_data_files", []):
        name = str(entry.get("filename") if isinstance(entry, dict) else entry)
        if Path(name).name != name:
            raise DataError(f"{path / 'state.json'}: {name!r} is not a file of this directory")
        yield from _stream(path / name)


def _stream(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            yield from _rows(path, stream)
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}") from None


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for row in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"{path}:row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """A table gives every row every field; null is what a row of JSON would not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: an object is needed, this is a {type(found).__name__}")
    return found
