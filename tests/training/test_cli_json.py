"""What `nibble train` prints for programs: one line of JSON, refusals too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training.cli import app


def said(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, json.loads(done.output.strip().splitlines()[-1])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    return path


def test_a_check_counts_and_names_the_bad_row(base_directory: Path, data: Path) -> None:
    status, found = said("check", str(data), "--base", str(base_directory), "--json")
    assert status == 1
    (report,) = found["data"]
    assert (report["rows"], report["bad"], report["examples"]) == (2, 1, 1)
    assert f"{data}:2: " in report["rejects"][0]
    assert found["config"]["optim"]["steps"] == 300


def test_a_config_is_resolved_or_refused_by_field() -> None:
    status, found = said("config", "--set", "data.train=x", "--set", "method.kind=ia3", "--json")
    assert (status, found["config"]["method"]["kind"]) == (0, "ia3")
    status, found = said("config", "--set", "data.train=x", "--set", "optim.steps=0", "--json")
    assert (status, found["error"]["field"]) == (2, "optim.steps")


def test_a_plan_has_its_figures(base_directory: Path, data: Path) -> None:
    flags = ["--set", "data.max_bad_rows=1", "--steps", "10", "--base", str(base_directory)]
    status, found = said("plan", "--data", str(data), *flags, "--json")
    plan = found["plan"]
    assert (status, plan["fits"], plan["examples"]) == (0, True, 1)
    assert plan["seconds"] == pytest.approx(10 * plan["seconds_per_step"])
    sample = plan["sample"]  # what the model reads, and what of it bears loss
    assert sample["prompt"].count("a") > sample["answer"].count("a")
    assert "b" in sample["answer"]


def test_a_run_logs_what_happened_and_goes_on(base_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "good.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = ["--base", str(base_directory), "--data", str(data), "--out", str(tmp_path / "out")]
    sets = ["--steps", "4", "--set", "checkpoint_every=2", "--continue"]
    for _ in range(2):  # the second finds nothing left to do
        assert CliRunner().invoke(app, ["run", *flags, *sets]).exit_code == 0
    run = tmp_path / "out" / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("step")) for e in events] == [
        ("started", 0),
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("finished", None),
        ("started", 4),
        ("finished", None),
    ]
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [step["number"] for step in steps] == [1, 2, 3, 4]
    assert all(events[0]["time"] <= step["time"] <= events[3]["time"] for step in steps)


def test_data_says_what_it_wrote_or_why_not(tmp_path: Path) -> None:
    status, found = said("data", "tickets", "--out", str(tmp_path), "--train-items", "5", "--json")
    assert (status, found["items"][f"{tmp_path}/train.jsonl"]) == (0, 5)
    status, found = said("data", "tikets", "--out", str(tmp_path), "--json")
    assert (status, "tikets" in found["error"]["message"]) == (2, True)


def test_an_evaluation_is_figures(base_directory: Path, data: Path) -> None:
    good = data.with_name("good.jsonl")
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = ["--base", str(base_directory), "--max-new-tokens", "2", "--json"]
    status, found = said("eval", str(good), *flags)
    assert (status, found["total"]) == (0, 1)
    assert found["interval"][0] <= found["exact_match"] <= found["interval"][1]


def test_a_run_says_what_it_did(base_directory: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "good.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = ["--base", str(base_directory), "--data", str(data), "--out", str(out), "--steps", "2"]
    done = CliRunner().invoke(app, ["run", *flags, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)  # the one line that there is
    assert (found["out"], found["steps"], found["ended"]) == (str(out), 2, "steps")
    told = json.loads((out / "training.json").read_text())
    assert told["run"]["loss"] == found["loss"]
    assert told["config"]["base"] == base_directory.name
    status, found = said("run", *flags, "--json", "--set", "optim.steps=0")
    assert (status, found["error"]["field"]) == (2, "optim.steps")


def test_a_second_check_imports_neither_torch_nor_transformers(
    base_directory: Path, data: Path
) -> None:
    said("check", str(data), "--base", str(base_directory), "--json")  # keeps the tokenizer
    program = (
        "import sys; from training.cli import app\n"
        f"try: app(['check', {str(data)!r}, '--base', {str(base_directory)!r}, '--json'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    report, last = done.stdout.strip().splitlines()
    assert (json.loads(report)["data"][0]["bad"], last) == (1, "1 set()"), done.stderr
