"""What `nibble base` prints for programs: one line of JSON, refusals too."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from base.cli import app
from base.mini import MINI, evaluate, packing

SMALL = (packing.Phase(1.0, 2, 64, 0.5, 0.5),)


def said(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    (line,) = done.stdout.splitlines()
    return done.exit_code, json.loads(line)


def test_a_card_says_where_it_is_and_what_it_lacks(tmp_path: Path) -> None:
    for name in ("config.json", "training.json"):
        shutil.copy(MINI / name, tmp_path)
    status, found = said("card", "mini", "--directory", str(tmp_path))
    assert (status, set(found["error"])) == (2, {"message", "next", "field"})
    assert found["error"]["message"].startswith(f"{tmp_path} has no evaluation.json: ")
    shutil.copy(MINI / "evaluation.json", tmp_path)
    status, found = said("card", "mini", "--directory", str(tmp_path))
    assert (status, found) == (0, {"card": str(tmp_path / "README.md")})
    assert (tmp_path / "README.md").read_bytes() == (MINI / "README.md").read_bytes()


@pytest.mark.parametrize("more", [(), ("--precision", "fast"), ("--kv-dtype", "int8")])
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, more: tuple[str, ...]) -> None:
    status, found = said("evaluate", "mini", "--directory", str(tmp_path), *more)
    assert (status, "has no config.json" in found["error"]["message"]) == (2, True)
    done = CliRunner().invoke(app, ["evaluate", "mini", "--directory", str(tmp_path), *more])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "refused: " in done.stderr


@pytest.mark.slow
def test_a_build_prints_one_line_beside_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PHASES", SMALL)
    monkeypatch.setattr(packing, "WARM_UP", 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # without a compiler it starts sooner
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    flags = ("build", "mini", "--out", str(tmp_path), "--steps", "2")
    assert said(*flags, "--seed", "3") == (0, {"out": str(tmp_path)})
    status, found = said(*flags, "--seed", "4", "--resume")
    assert (status, "seed 3, not 4" in found["error"]["message"]) == (2, True)


@pytest.mark.slow
def test_an_evaluation_is_the_file_that_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MINI, tmp_path / "mini")
    monkeypatch.setattr(evaluate, "Size", partial(evaluate.Size, 1, 2, 2))
    status, found = said("evaluate", "mini", "--directory", str(tmp_path / "mini"))
    assert status == 0
    assert found == json.loads((tmp_path / "mini" / "evaluation.json").read_text())
    assert found["items"]["each task"] == 2
    assert "each task 2" in (tmp_path / "mini" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--precision", "fast"), ("--kv-dtype", "int8")])
def test_a_comparison_has_its_verdict(more: tuple[str, ...]) -> None:
    status, found = said("evaluate", "mini", "--items", "1", *more)
    assert status == (0 if found["within"] else 1)
    assert set(found["summary"]) == {"perplexity", "tasks", "context"}
    assert set(found["exact"]) == set(found["fast"]) == {"context", "tasks", "loss"}
    assert found["layers"]
