"""`nibble base build full` and `dapt`: a base that is served, and what it learnt and forgot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from base.cli import GROUP, builds
from base.load import load_base, load_float
from training.base_build import lines
from training.base_cli import dapt, full
from training.config import BuildConfig, read_schema
from training.errors import ConfigError
from training.recipe import Run, Step

runner = CliRunner()


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    folder = tmp_path / "domain"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("a.txt", "deep/b.md")):
        words = "".join(f"part {index} item {i % 7} of the domain.\n\n" for i in range(60))
        (folder / name).write_text(words)
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "item 1 of", "completion": " the"}\n' * 3)
    (tmp_path / "general.txt").write_text("nothing of that kind, but other words. " * 20)
    return folder


def test_dapt_learns_the_domain_and_says_what_it_forgot(
    base_directory: Path, domain: Path, tmp_path: Path
) -> None:
    out, near = tmp_path / "new", domain.parent
    flags = ["--base", str(base_directory), "--data", str(domain), "--out", str(out)]
    flags += ["--steps", "12", "--batch-size", "4", "--lr", "0.002", "--set", "data.max_length=32"]
    flags += ["--set", "data.split=0.2", "--task", f"items={near / 'tasks.jsonl'}"]
    flags += ["--general", str(near / "general.txt"), "--set", "measure.max_new_tokens=4"]
    done = runner.invoke(dapt, flags)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "evaluation.json").read_text())
    table = {row["before"]["name"]: row for row in found["table"]}
    assert set(table) == {"the new data, held out", "general text", "items"}
    learnt, other = (table[name] for name in ("the new data, held out", "general text"))
    assert learnt["after"]["value"] < learnt["before"]["value"] - 1
    gain = learnt["before"]["value"] - learnt["after"]["value"]
    assert other["before"]["value"] - other["after"]["value"] < gain
    assert table["items"]["before"]["count"] == 3
    assert found["config"]["data"]["packing"] is True
    card = (out / "README.md").read_text()
    assert f"| {learnt['before']['value']:.3f} | {learnt['after']['value']:.3f} |" in card
    served = load_base(out, device="cpu", dtype="float32", keep=False)
    assert served.tokenizer.eos_token_id == 2
    ids = torch.arange(3, 20)[None]
    assert served.model(input_ids=ids).logits.isfinite().all()


def test_a_build_that_is_interrupted_leaves_a_base_and_goes_on_to_the_same_bits(
    base_directory: Path, domain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--base", str(base_directory), "--data", str(domain), "--steps", "4"]
    flags += ["--batch-size", "4", "--set", "data.max_length=32", "--set", "data.raw=true"]
    whole = runner.invoke(full, [*flags, "--out", str(tmp_path / "whole"), "--json"])
    assert whole.exit_code == 0, whole.output
    said = json.loads(whole.output)  # the one line that there is
    table = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["table"]
    assert (said["steps"], said["table"]) == (4, table)
    step = Run.step

    def interrupted(self: Run) -> Step:
        import os
        import signal

        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        cut = runner.invoke(full, [*flags, "--out", str(tmp_path / "cut")])
    assert cut.exit_code == 130, cut.output
    assert load_float(tmp_path / "cut", device="cpu").spec.num_layers == 2
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    measured = (tmp_path / "cut" / "run" / "before.json").read_text()
    rest = runner.invoke(full, [*flags, "--out", str(tmp_path / "cut"), "--resume"])
    assert rest.exit_code == 0, rest.output
    assert (tmp_path / "cut" / "run" / "before.json").read_text() == measured
    one, two = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()


def test_the_file_and_the_flags_win_over_what_a_build_takes_for_granted(tmp_path: Path) -> None:
    defaults = {"method.kind": "full", "data.split": 0.05, "data.raw": True}
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: x, eval: y, raw: false}\n")
    found = read_schema(BuildConfig, file, {}, defaults)
    assert (found.data.split, found.data.raw, found.method.kind) == (None, False, "full")
    with pytest.raises(ConfigError, match=r"data\.eval and data\.split"):
        read_schema(BuildConfig, file, {"data.split": 0.1}, defaults)
    with pytest.raises(ConfigError, match=r"measure\.items"):
        read_schema(BuildConfig, file, {"measure.items": 0}, defaults)


def test_the_package_brings_both_to_the_command() -> None:
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"][GROUP]
    assert points == {"full": "training.base_cli:full", "dapt": "training.base_cli:dapt"}
    assert "mini" in {command.name for command in builds.registered_commands}
    assert list(lines([])) == []
