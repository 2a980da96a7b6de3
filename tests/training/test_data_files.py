"""Files of every format, row by row: what is read, what is refused and by which place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data import read_rows
from training.data import source as source_module
from training.data.source import scan
from training.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a "b",\n', "completion": "c;\té한글"},
    {"prompt": "", "completion": "line\u2028separator"},
    {"prompt": "x" * 300, "completion": "y"},
]


def _csv_text(rows: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _write_dataset(path: Path, rows: list[dict[str, Any]], shards: int = 2) -> Path:
    """As `Dataset.save_to_disk` lays it out: Arrow streams and the state that lists them."""
    path.mkdir()
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i::shards], schema=pa.Table.from_pylist(rows).schema)
        with (path / name).open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")
    return path


WRITERS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda p: p.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)),
    ".json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    ".csv": lambda p: p.write_text(_csv_text(ROWS, ","), newline=""),
    ".tsv": lambda p: p.write_text("\ufeff" + _csv_text(ROWS, "\t"), newline=""),
    ".parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=2),
    "": lambda p: _write_dataset(p, ROWS, shards=1),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_CHUNK", 7)  # a row never comes in one piece
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert [row for _, row in read_rows(path)] == ROWS


def test_places_are_lines_where_there_are_lines(tmp_path: Path) -> None:
    places = {}
    for suffix, write in WRITERS.items():
        path = tmp_path / f"rows{suffix}"
        write(path)
        places[suffix] = [place.removeprefix(str(path)) for place, _ in read_rows(path)]
    assert places[".jsonl"] == [":1", ":2", ":3"]
    assert places[".json"] == [":2, item 1", ":6, item 2", ":10, item 3"]
    assert places[".csv"] == places[".tsv"] == [":2", ":4", ":5"]
    assert places[".parquet"] == [":row 1", ":row 2", ":row 3"]
    assert places[""] == [f"/data-00000-of-00001.arrow:row {i}" for i in (1, 2, 3)]


def test_all_shards_of_a_dataset_are_read_and_nulls_are_absent(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i), "name": None}]} for i in range(700)]
    rows[1]["messages"][0]["name"] = "n"
    path = _write_dataset(tmp_path / "set", rows)
    got = [row["messages"][0] for _, row in read_rows(path)]
    assert [m["content"] for m in got[:350]] == [str(i) for i in range(0, 700, 2)]
    assert [m["content"] for m in got[350:]] == [str(i) for i in range(1, 700, 2)]
    assert [m for m in got if "name" in m] == [{"role": "user", "content": "1", "name": "n"}]


def test_a_split_is_never_guessed(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    _write_dataset(folder / "test", ROWS)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"splits train, test: name one"):
        list(scan(folder))
    assert len(list(read_rows(folder / "test"))) == 3
    state = folder / "test" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../train/data.arrow"}]}')
    with pytest.raises(DataError, match="not a file of this directory"):
        list(scan(folder / "test"))


def test_a_folder_of_files_is_read_as_one_unless_splits_would_mix(tmp_path: Path) -> None:
    def shard(name: str, *numbers: int) -> None:
        (tmp_path / name).write_text("".join(f'{{"a": {n}}}\n' for n in numbers))

    with pytest.raises(DataError, match="without files of data"):
        list(scan(tmp_path))
    shard("train-00001.jsonl", 3)
    shard("train-00000.jsonl", 1, 2)
    (tmp_path / "README.md").write_text("about")
    assert [row["a"] for _, row in read_rows(tmp_path)] == [1, 2, 3]
    assert [place.rpartition("/")[2] for place, _ in read_rows(tmp_path)][
        2
    ] == "train-00001.jsonl:1"
    for stranger in ("test.jsonl", "train-00002.csv", "more.jsonl"):
        shard(stranger, 4)
        with pytest.raises(DataError, match="more than one kind or split; name one file"):
            list(scan(tmp_path))
        (tmp_path / stranger).unlink()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.xlsx", "", r"\.xlsx is not known; one of \.jsonl"),
        ("a.json", '"a"', r"a\.json:1: an array"),
        ("a.json", '[{"a": 1}\n\n{"a": 2}]', r"a\.json:3: '{' after item 1"),
        ("a.json", '[{"a": 1},\n{"a"\n 2}]', r"a\.json:3: not JSON"),
        ("a.json", '[{"a": 1}', r"a\.json:1: '' after item 1"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', r"a\.json:2: '\[' after the array"),
        ("a.csv", 'a\n1\n"2\n3\n', r"a\.csv:3: unexpected end of data"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: columns"),
        ("a.parquet", "no parquet at all", r"a\.parquet: "),
    ],
)
def test_a_file_that_cannot_be_trusted_further_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        list(scan(path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a"\n{"a": 2}\n',
            r"a\.jsonl:2: not JSON: it ends too early, column 5",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": 3},\n{"a": 2}\n', "a comma behind the value.*, column 9"),
        ("a.jsonl", b'{"a": 1}\n{"a": 3,}\n{"a": 2}\n', "a comma before '}'.*, column 9"),
        ("a.jsonl", b'{"a": 1}\n"\xff"\n{"a": 2}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.json", b'[{"a": 1},\n 7,\n{"a": 2}]', r"a\.json:2, item 2: .*int"),
        ("a.csv", b"a\n1\n2,3\n2\n", r"a\.csv:3: 2 fields"),
        ("a.csv", b'a\n1\n"2"x\n2\n', r"a\.csv:3: "),
    ],
)
def test_a_bad_row_is_named_and_the_rest_is_read(
    tmp_path: Path, name: str, text: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    found = [row for _, row in scan(path)]
    assert [str(dict(r)["a"]) for r in found if not isinstance(r, DataError)] == ["1", "2"]
    (error,) = (row for row in found if isinstance(row, DataError))
    with pytest.raises(DataError, match=said):
        raise error
    with pytest.raises(DataError, match=said):
        list(read_rows(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        list(scan(tmp_path / "none.jsonl"))


def test_json_lines_are_read_by_the_name_of_json_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for _, row in read_rows(path)] == ROWS
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n" + json.dumps(ROWS[1]))
    assert [isinstance(row, DataError) for _, row in scan(path)] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "encoding", "said"),
    [
        ("a.csv", "cp949", r"a.csv: not UTF-8 \(byte 0xbc at 18\): save it as UTF-8"),
        ("a.jsonl", "cp949", r"a.jsonl:1: not UTF-8 \(byte 0xbc"),
        ("a.jsonl", "utf-16", r"a.jsonl: UTF-16: save it as UTF-8"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, name: str, encoding: str, said: str) -> None:
    path = tmp_path / name
    path.write_text("prompt,completion\n서울,a\n" if ".csv" in name else '{"a": "서"}', encoding)
    with pytest.raises(DataError, match=said):
        list(read_rows(path))


def test_an_array_is_no_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n[\n {"a": 1}\n]\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: a JSON array: name it \.json"):
        list(scan(path))
