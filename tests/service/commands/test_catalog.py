"""`nibble catalog migrate`: tables are made once, and a database that fails says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from adapters.catalog import HEAD
from service.commands.catalog import app


def test_tables_are_made_and_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):
        done = CliRunner().invoke(app, ["migrate", "--home", str(home)])
        assert done.exit_code == 0, done.output
        assert f"revision {HEAD}" in done.output
    said = CliRunner().invoke(app, ["migrate", "--home", str(home), "--json"])
    assert json.loads(said.output) == {"catalog": f"sqlite:///{home}/catalog.db", "revision": HEAD}
    engine = sa.create_engine(f"sqlite:///{home / 'catalog.db'}")
    assert sa.inspect(engine).has_table("adapters")
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["sqlite:////nonexistent/catalog.db", "postgresql://u:hidden@127.0.0.1:1/none"]
)
def test_a_database_that_cannot_be_used_is_a_clear_end(url: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["migrate", "--home", str(tmp_path), "--catalog", url])
    assert done.exit_code == 1
    assert "hidden" not in done.output
    assert isinstance(done.exception, SystemExit)
