"""The console: what is served is what its sources were built to, small, and from here alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.api.console import BUILT
from service.app import create_app
from service.config import Settings
from service.jobs.order import _NOT_HERE

SOURCE = BUILT.parent
ROOTS = ("index.html", "package.json", "package-lock.json", "stamp.js", "vite.config.js", "src")
FIRST_VIEW = 200_000  # bytes of script


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A client of an application that serves nothing but its pages: no base is loaded."""
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    return TestClient(create_app(settings), raise_server_exceptions=False)


def _files(roots: Iterable[Path]) -> list[Path]:
    return [
        path
        for root in roots
        for path in (root.rglob("*") if root.is_dir() else [root])
        if path.is_file()
    ]


def _digest(paths: Iterable[Path]) -> str:
    """As service/console/stamp.js makes it."""
    named = sorted((path.relative_to(SOURCE).as_posix(), path) for path in paths)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in named]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_built_files_are_those_of_the_sources() -> None:
    stamp = json.loads((BUILT / "stamp.json").read_text())
    built = [path for path in _files([BUILT]) if path.name != "stamp.json"]
    sources = _digest(_files(SOURCE / name for name in ROOTS))
    assert sources == stamp["sources"], "the sources have changed since the build: make console"
    assert _digest(built) == stamp["built"], "the built files were changed by hand: make console"


def test_page_and_files_with_a_strict_policy(browser: TestClient) -> None:
    page = browser.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page.text)
    named = re.findall(r'(?:src|href)="\./(console/[^"]+)"', page.text)
    assert len(named) >= 3  # script, style, icon
    for name in named:
        found = browser.get(f"/{name}")
        assert found.status_code == 200, name
        assert found.content == (BUILT / name).read_bytes()
        assert "immutable" in found.headers["cache-control"]


@pytest.mark.parametrize("name", ["none.js", "..%2fstamp.json", "..%2f..%2fpackage.json"])
def test_nothing_else_is_served(browser: TestClient, name: str) -> None:
    found = browser.get(f"/console/{name}")
    assert found.status_code == 404
    assert found.json()["error_type"] == "not_found"


def test_posting_to_the_same_place_still_generates(browser: TestClient) -> None:
    """Clients of text-generation-inference post to `/`; here no base is there to answer."""
    found = browser.post("/", json={"inputs": "Once"})
    assert found.status_code == 503
    assert found.json()["error_type"] == "loading"


def _with_imports(names: Iterable[str]) -> set[str]:
    """These scripts, and what they import before they run."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            script = (BUILT / "console" / name).read_text()
            left += re.findall(r'(?:from|import)\s*"\./([^"]+\.js)"', script)
    return found


def test_first_view_is_light() -> None:
    page = (BUILT / "index.html").read_text()
    entry = re.findall(r'src="\./console/([^"]+\.js)"', page)
    (playground,) = (BUILT / "console").glob("Playground-*.js")
    scripts = _with_imports([*entry, playground.name])
    assert len(scripts) >= 3
    assert sum((BUILT / "console" / name).stat().st_size for name in scripts) < FIRST_VIEW
    everything = list((BUILT / "console").glob("*.js"))
    assert len(scripts) < len(everything), "each page is a file of its own"


def test_nothing_comes_from_elsewhere() -> None:
    for path in _files([BUILT]):
        addresses = re.findall(r"https?://[\w.-]+", path.read_text(encoding="utf-8"))
        # A namespace of SVG, and where Svelte explains its errors: names, not requests.
        names = {"http://www.w3.org", "https://svelte.dev", "http://127.0.0.1"}
        assert set(addresses) <= names, path.name


def test_methods_of_the_form_are_those_that_train_here() -> None:
    from training.methods import METHODS

    source = (SOURCE / "src" / "parts" / "NewJob.svelte").read_text()
    listed = re.search(r"METHODS = \[(.*?)\]", source, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"'(\w+)'", listed[1])) == set(METHODS) - _NOT_HERE


def test_every_text_is_there_in_korean() -> None:
    source = SOURCE / "src"
    text = (source / "korean.js").read_text(encoding="utf-8")
    korean = dict(re.findall(r"^  '(.+)': '(.+)',$", text, re.MULTILINE))
    asked = [
        found
        for path in _files([source])
        if path.suffix in (".svelte", ".js")
        for found in re.findall(r"\bt\(\s*'((?:[^'\\]|\\.)*)'", path.read_text(encoding="utf-8"))
    ]
    assert len(asked) > 200
    assert set(asked) - set(korean) == set()
    slots = re.compile(r"\{\w+\}")
    for english, said in korean.items():
        assert sorted(slots.findall(english)) == sorted(slots.findall(said)), english
