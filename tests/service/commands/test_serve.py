"""`nibble serve` when it cannot: status 1, the reason, and the next step."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.catalog import Catalog
from adapters.errors import StoreUnavailable
from service.access.keys import Keys
from service.app import open_store, why_not
from service.commands import serve
from service.config import Settings
from service.jobs.opening import own_id

ROOT = Path(__file__).resolve().parents[3]


def start(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "serve", "--home", str(home), *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    done = start(tmp_path / "home", "--port", "0", "--base", str(tmp_path / "no-model"))
    assert done.returncode == 1
    assert "no-model" in done.stderr
    assert "--base takes another one" in done.stderr


@pytest.mark.parametrize("broken", ["catalog.db", "blobs", "uploads", "id"])
def test_a_home_that_cannot_be_used_is_not_the_bases_fault(tmp_path: Path, broken: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if broken in ("catalog.db", "id"):
        (home / broken).mkdir()
    else:
        (home / broken).write_text("not a directory")
    what, reason, next_step = why_not(failing(home), Settings(home=home))
    assert what == "the server could not start"
    assert "internal" not in reason
    assert f"--home {home}" in next_step
    assert "--base" not in next_step


def failing(home: Path) -> Exception:
    settings = Settings(home=home)
    try:
        open_store(settings).close()
        own_id(home)
    except Exception as error:
        return error
    raise AssertionError("it opened")


def test_the_next_step_keeps_a_password_to_itself() -> None:
    settings = Settings(catalog="postgresql://nibble:s3cret@db/nibble")
    *_, next_step = why_not(StoreUnavailable("the catalog failed: no route"), settings)
    assert "db/nibble" in next_step
    assert "s3cret" not in next_step


@pytest.mark.slow
def test_a_catalog_that_fails_ends_with_the_right_hint(tmp_path: Path) -> None:
    (tmp_path / "home" / "catalog.db").mkdir(parents=True)
    done = start(tmp_path / "home", "--port", "0")
    assert done.returncode == 1
    assert "the server could not start: the catalog failed" in done.stderr
    assert "these have to be there, writable" in done.stderr
    assert "--base" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = start(tmp_path / "home", "--port", str(port), "--base", str(tmp_path / "no-model"))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port 0" in done.stderr


def test_a_namesake_package_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "shadowed", lambda: "the unrelated package adapters is installed")
    done = CliRunner().invoke(serve.app, [])
    assert done.exit_code == 1
    assert "pip uninstall adapters" in done.stderr


@pytest.mark.parametrize(
    ("host", "refused"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)],
)
def test_an_address_that_others_reach_wants_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, refused: bool
) -> None:
    monkeypatch.setattr(serve, "shadowed", lambda: "stop here")
    given = ["--host", host, "--home", str(tmp_path)]
    done = CliRunner().invoke(serve.app, given)
    assert ("there are no keys yet" in done.stderr) == refused
    assert ("nibble keys create" in done.stderr) == refused
    assert ("stop here" in done.stderr) != refused
    opened = CliRunner().invoke(serve.app, [*given, "--open"])
    assert ("whoever reaches it" in opened.stderr) == refused
    assert "stop here" in opened.stderr
    bootstrap = CliRunner().invoke(serve.app, given, env={"NIBBLE_ADMIN_KEY": "a key of the chart"})
    assert "stop here" in bootstrap.stderr


def test_a_key_in_the_catalog_lets_it_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve, "shadowed", lambda: "stop here")
    catalog = Catalog(str(tmp_path / "catalog.db"))
    Keys(catalog).create("first", "default", ["admin"])
    catalog.close()
    done = CliRunner().invoke(serve.app, ["--host", "0.0.0.0", "--home", str(tmp_path)])
    assert "stop here" in done.stderr
    assert "reached from outside" not in done.stderr
