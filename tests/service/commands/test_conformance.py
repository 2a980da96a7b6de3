"""`nibble conformance`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.commands import conformance
from service.conformance import suite
from service.conformance.report import BEGIN, END
from service.conformance.result import CHECKS, Cell, Row
from service.conformance.suite import Options


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of each run, in place of the runs: `test_suite.py` has those."""
    seen: list[Options] = []

    def run(options: Options, home: Path, tell: Any) -> list[Row]:
        assert home.is_dir()
        seen.append(options)
        tell("at work")
        status: Any = "fail" if options.kinds == ("dora",) else "pass"
        cells = dict.fromkeys(CHECKS, Cell(status, 0.25, "far off"))
        return [Row(kind, base, cells) for base in options.bases for kind in options.kinds]

    monkeypatch.setattr(suite, "run", run)
    return seen


def test_it_prints_the_table_and_writes_what_it_is_asked_to(
    asked: list[Options], tmp_path: Path
) -> None:
    readme, figures = tmp_path / "README.md", tmp_path / "figures.json"
    readme.write_text(f"{BEGIN}{END}")
    flags = ["--base", "qwen3", "--kind", "lora", "--no-timed"]
    files = ["--json", str(figures), "--update", str(readme)]
    done = CliRunner().invoke(conformance.app, [*flags, *files])
    assert done.exit_code == 0, done.output
    assert asked == [Options(("qwen3",), ("lora",), timed=False)]
    assert "| `lora` |" in done.stdout
    assert "| `lora` |" in readme.read_text()
    assert json.loads(figures.read_text())["rows"][0]["kind"] == "lora"
    assert "at work" in done.stderr


def test_a_failure_is_named_and_ends_with_1(asked: list[Options]) -> None:
    done = CliRunner().invoke(conformance.app, ["--kind", "dora"])
    assert done.exit_code == 1
    assert asked[0].bases == suite.BASES
    assert "dora on gemma, peft: 0.25 far off" in done.stderr


@pytest.mark.parametrize("flag", ["--kind", "--base"])
def test_an_unknown_name_lists_the_known_ones(flag: str, asked: list[Options]) -> None:
    done = CliRunner().invoke(conformance.app, [flag, "nothing"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "expected one of" in done.stderr
    assert not asked


def test_a_file_without_marks(asked: list[Options], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    done = CliRunner().invoke(
        conformance.app, ["--base", "qwen3", "--kind", "lora", "--update", str(readme)]
    )
    assert done.exit_code == 1
    assert "no place for the table" in done.stderr
