import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InvalidAdapter, TooLarge, UnsupportedMedia
from adapters.limits import Limits
from adapters.safetensors_header import Header, open_regular, read_header
from tests.adapters.hostile import framed, safetensors_bytes, write

A = ("F32", [2, 3], None)
B = ("BF16", [4], None)


def parse(path: Path, limits: Limits | None = None) -> Header:
    with open_regular(path) as fd:
        return read_header(fd, limits or Limits())


def refusal(tmp_path: Path, content: bytes, limits: Limits | None = None) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        parse(write(tmp_path / "w", content), limits)
    return caught.value


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    content = safetensors_bytes({"a": A, "b": B}, metadata={"format": "pt"})
    header = parse(write(tmp_path / "w", content))
    assert header.metadata == {"format": "pt"}
    assert [(e.name, e.dtype, e.shape) for e in header.tensors.values()] == [
        ("a", "F32", (2, 3)),
        ("b", "BF16", (4,)),
    ]
    a, b = header.tensors.values()
    assert (a.stop - a.start, b.start, b.stop) == (24, a.stop, len(content))


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"dtype": "F64"}, "expected one of F32, F16, BF16"),
        ({"dtype": "I8"}, "expected one of"),
        ({"dtype": ["F32"]}, "expected one of"),
        ({"shape": [2, 4]}, "expected 32"),
        ({"shape": [-2, -3]}, "positive dimensions"),
        ({"shape": [0, 3]}, "positive dimensions"),
        ({"shape": []}, "1 to 4"),
        ({"shape": [1, 1, 1, 2, 3]}, "1 to 4"),
        ({"shape": [True, 6]}, "positive dimensions"),
        ({"shape": [2.0, 3]}, "positive dimensions"),
        ({"shape": [1 << 62, 1 << 62]}, "expected"),
        ({"shape": [1 << 70]}, "positive dimensions"),
        ({"shape": "23"}, "positive dimensions"),
        ({"data_offsets": [0, 20]}, "expected 24"),
        ({"data_offsets": [24, 0]}, "expected 24"),
        ({"data_offsets": [-24, 0]}, "expected [start, stop]"),
        ({"data_offsets": [0]}, "expected [start, stop]"),
        ({"data_offsets": None}, "expected [start, stop]"),
        ({"more": 1}, "exactly dtype, shape and data_offsets"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, patch: dict[str, Any], words: str) -> None:
    error = refusal(tmp_path, safetensors_bytes({"bad": A}, patch={"bad": patch}))
    assert error.where == "bad"
    assert words in error.reason


def test_overlap_and_gap_are_refused(tmp_path: Path) -> None:
    same = {"b": {"data_offsets": [16, 24]}}
    assert "overlaps" in refusal(tmp_path, safetensors_bytes({"a": A, "b": B}, patch=same)).reason
    far = {"b": {"data_offsets": [32, 40]}}
    content = safetensors_bytes({"a": A, "b": B}, patch=far, tail=bytes(8))
    assert "gap" in refusal(tmp_path, content).reason


def test_data_must_end_with_the_file(tmp_path: Path) -> None:
    good = safetensors_bytes({"a": A})
    assert "no tensor uses" in refusal(tmp_path, good + b"x").reason
    assert "cut short" in refusal(tmp_path, good[:-1]).reason


def test_offsets_far_outside_the_file(tmp_path: Path) -> None:
    patch = {"a": {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    assert "cut short" in refusal(tmp_path, safetensors_bytes({"a": A}, patch=patch)).reason


def test_duplicate_keys(tmp_path: Path) -> None:
    row = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    twice = framed(f'{{"a":{row},"a":{row}}}'.encode(), bytes(4))
    assert "appears twice" in refusal(tmp_path, twice).reason
    inner = framed(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    )
    assert "appears twice" in refusal(tmp_path, inner).reason


def test_header_bombs(tmp_path: Path) -> None:
    long = framed(b"{" + b" " * (1 << 20) + b"}")
    assert isinstance(refusal(tmp_path, long), TooLarge)
    rows = {f"t{i}": ("F32", [1], None) for i in range(33)}
    small = Limits(max_tensors=32)
    assert isinstance(refusal(tmp_path, safetensors_bytes(rows), small), TooLarge)
    assert "cut short" in refusal(tmp_path, framed(b"{}", length=1 << 19)).reason
    assert isinstance(refusal(tmp_path, framed(b"{}", length=1 << 63)), TooLarge)
    assert "not JSON" in refusal(tmp_path, framed(b'{"a":' + b"[" * 500_000)).reason
    assert "not JSON" in refusal(tmp_path, framed(b'{"a":' + b"9" * 9000 + b"}")).reason


def test_the_file_has_a_limit(tmp_path: Path) -> None:
    content = safetensors_bytes({"a": A})
    parse(write(tmp_path / "w", content), Limits(max_weights_bytes=len(content)))
    assert isinstance(
        refusal(tmp_path, content, Limits(max_weights_bytes=len(content) - 1)), TooLarge
    )


@pytest.mark.parametrize(
    "header", [b"{]", b"{", b"{\xff}", b'{"a":NaN}', b'{"a":1}', b'{"a":null}', b'{"a":[]}']
)
def test_broken_json(tmp_path: Path, header: bytes) -> None:
    refusal(tmp_path, framed(header))


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": None}])
def test_metadata_maps_strings(tmp_path: Path, metadata: Any) -> None:
    error = refusal(tmp_path, safetensors_bytes({"a": A}, metadata=metadata))
    assert error.where == "__metadata__"


@pytest.mark.parametrize("name", ["", "a\x00b", "a\nb", "ａ", "a" * 513])
def test_names_are_short_printable_ascii(tmp_path: Path, name: str) -> None:
    assert "printable ASCII" in refusal(tmp_path, safetensors_bytes({name: A})).reason


def a_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 600)
    return stream.getvalue()


def a_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("adapter_model.safetensors"))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (a_zip(), "zip archive"),
        (a_tar(), "tar archive"),
        (b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00.", "a pickle"),
        (b"\x80\x02}q\x00.........", "a pickle"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "gzip"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"", "too short"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00", "too short"),
        (b"hello, I am no weights", "unknown format"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    error = refusal(tmp_path, content)
    assert isinstance(error, UnsupportedMedia)
    assert words in error.reason


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Length 640 is the bytes 80 02: also the start of a pickle."""
    row = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = framed(row.ljust(640), bytes(4))
    assert content.startswith(b"\x80\x02")
    assert list(parse(write(tmp_path / "w", content)).tensors) == ["a"]


def test_only_regular_files(tmp_path: Path) -> None:
    good = write(tmp_path / "good", safetensors_bytes({"a": A}))
    (tmp_path / "link").symlink_to(good)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "pipe", tmp_path, tmp_path / "none", Path("a\0b")):
        with pytest.raises(InvalidAdapter, match="regular file"):
            parse(path)
    with pytest.raises(InvalidAdapter, match="regular file"):
        parse(Path("/dev/zero"))


GOOD = safetensors_bytes(
    {"a": ("F32", [2, 2], bytes(range(16))), "b": ("BF16", [3], None), "c": ("F16", [1, 1], None)},
    metadata={"format": "pt"},
)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """The good file with some bytes changed, cut out or put in."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=6) | st.sampled_from([b'"', b"}", b"9", b"-", b",", b"[]"]))
        content[at : at + draw(st.integers(0, 6))] = piece
    return bytes(content)


@settings(max_examples=600)
@given(mutants())
def test_mutants_are_refused_or_read_as_the_reference_reads_them(
    tmp_path: Path, content: bytes
) -> None:
    """Never another exception; and what is accepted, the reference accepts and reads the same."""
    try:
        header = parse(write(tmp_path / "w", content))
    except InvalidAdapter:
        return
    deserialize: Any = safetensors.deserialize  # the package has no types
    reference = dict(deserialize(content))
    assert set(reference) == set(header.tensors)
    for name, entry in header.tensors.items():
        assert reference[name]["dtype"] == entry.dtype
        assert tuple(reference[name]["shape"]) == entry.shape
        assert bytes(reference[name]["data"]) == content[entry.start : entry.stop]
