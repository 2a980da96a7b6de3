"""Strangers' files are read in a child that can be killed; the others are read all the same."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.retrieval import parsing
from service.retrieval.errors import DocumentRefused
from service.retrieval.parsing import Parsed, ParseLimits, Source, format_of, parse
from tests.service.retrieval.files import write_docx, write_pdf
from tests.waiting import PATIENCE

pytest.importorskip("markitdown", reason="needs the extra rag")


def read(*paths: Path, limits: ParseLimits | None = None) -> list[list[Parsed] | DocumentRefused]:
    sources = [Source(path.name, path, format_of(path.name)) for path in paths]
    return list(parse(sources, limits))


def refusal(found: list[Parsed] | DocumentRefused) -> str:
    assert isinstance(found, DocumentRefused), found
    return found.reason


def written(directory: Path, **files: str) -> list[Path]:
    paths = []
    for name, text in files.items():
        path = directory / name.replace("_", ".")
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def test_every_format_becomes_text(tmp_path: Path) -> None:
    paths = written(
        tmp_path,
        a_md="# Title\n\nsome täxt",
        b_html="<h1>Title</h1><p>A <b>bold</b> word</p><script>no()</script>",
        c_csv="name,town\nMerla,Tovan\n",
        d_jsonl='{"text": "one", "id": "x"}\n\n{"text": "two", "metadata": {"year": 1}}\n',
    )
    write_docx(tmp_path / "e.docx", "Title", "A body.")
    write_pdf(tmp_path / "f.pdf", "Hello from a page")
    found = read(*paths, tmp_path / "e.docx", tmp_path / "f.pdf")
    texts = [[one.text.strip() for one in each] for each in found if isinstance(each, list)]
    assert texts == [
        ["# Title\n\nsome täxt"],
        ["# Title\n\nA **bold** word"],
        ["| name | town |\n| --- | --- |\n| Merla | Tovan |"],
        ["one", "two"],
        ["# Title\n\nA body."],
        ["Hello from a page"],
    ]
    assert isinstance(found[3], list)
    assert [(one.id, one.metadata) for one in found[3]] == [("x", {}), ("d.jsonl#3", {"year": 1})]


def test_a_bad_file_is_refused_with_its_reason_and_the_next_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff")
    (tmp_path / "b.pdf").write_bytes(b"PK\x03\x04 an archive")
    (tmp_path / "c.docx").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "d.txt").write_bytes(b"a\0b")
    paths = written(tmp_path, e_jsonl='{"text": 1}\n', f_jsonl="{\n", g_txt="good")
    found = read(*(tmp_path / n for n in ("a.txt", "b.pdf", "c.docx", "d.txt")), *paths)
    assert "not UTF-8 at byte 5" in refusal(found[0])
    assert "no .pdf file" in refusal(found[1])
    assert "cannot be read as docx" in refusal(found[2])
    assert "NUL" in refusal(found[3])
    assert 'line 1 should be an object with "text"' in refusal(found[4])
    assert "line 1 is not JSON" in refusal(found[5])
    assert found[6] == [Parsed("g.txt", "good", {})]


def test_a_file_that_swells_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    write_docx(tmp_path / "bomb.docx", "Title", "A" * (160 << 20))
    assert (tmp_path / "bomb.docx").stat().st_size < 1 << 20
    (after,) = written(tmp_path, b_txt="still read")
    limits = ParseLimits(memory_bytes=400 << 20)
    bomb, good = read(tmp_path / "bomb.docx", after, limits=limits)
    assert "needed more than 419430400 bytes" in refusal(bomb)
    assert good == [Parsed("b.txt", "still read", {})]


def test_a_file_that_takes_too_long_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, good = written(tmp_path, a_html="<div>" * 150_000, b_txt="still read")
    patience = iter([1.5, PATIENCE])  # the next one's child has to start
    clocks = SimpleNamespace(Timer=lambda _, expire: threading.Timer(next(patience), expire))
    with monkeypatch.context() as patch:
        patch.setattr(parsing, "threading", clocks)
        late, after = read(slow, good, limits=ParseLimits(seconds=1.5))
    assert "did not end within 1.5 s" in refusal(late)
    assert after == [Parsed("b.txt", "still read", {})]
    # What a busy machine does not give is no fault of the file.
    assert ParseLimits().seconds >= 5 * ParseLimits().cpu_seconds
    spun, after = read(slow, good, limits=ParseLimits(cpu_seconds=1))
    assert "more than 1 s of processor time" in refusal(spun)
    assert after == [Parsed("b.txt", "still read", {})]


def test_more_text_than_allowed_is_refused(tmp_path: Path) -> None:
    (path,) = written(tmp_path, a_txt="x" * 2000)
    (found,) = read(path, limits=ParseLimits(max_characters=1000))
    assert "2000 characters of text; at most 1000" in refusal(found)


@pytest.mark.parametrize("name", ["a.zip", "a.py", "a", "a.pdf.exe"])
def test_other_suffixes_are_refused(name: str) -> None:
    with pytest.raises(DocumentRefused, match="are not read"):
        format_of(name)
