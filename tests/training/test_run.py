"""A run's life: resumed bit for bit, ended early, interrupted, planned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from base.load import Base
from tests.training.runs import run_of
from tests.waiting import PATIENCE
from training.cli import app
from training.config import TrainConfig
from training.data import Example
from training.data.batches import Batches
from training.errors import ConfigError
from training.methods import attach
from training.methods.files import WEIGHTS
from training.plan import make_plan
from training.recipe import Step, mean_loss, train
from training.run_directory import RunDirectory
from training.tree import read_tree, write_tree

STOP = 2
PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(12)]


def _train(
    base: Base, config: TrainConfig, cut: int | None = None, resume: Any = None, held: Any = ()
) -> tuple[list[torch.Tensor], Any, list[Step], str]:
    """The weights at the end, the last state that was kept, the steps, and why it ended."""
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    kept: list[Any] = []
    steps: list[Step] = []
    done = train(
        base,
        adapter,
        PAIRS,
        held,
        config,
        steps.append,
        resume=resume,
        keep=kept.append,
        asked_to_stop=lambda: cut is not None and steps[-1].number == cut,
    )
    weights = [p.detach().clone() for p in adapter.parameters()]
    adapter.detach()
    return weights, kept[-1], steps, done.ended


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("lora", {"rank": 2, "dropout": 0.2}),
        ("dora", {"rank": 2}),
        ("bottleneck", {"variant": "houlsby"}),
        ("adalora", {"rank": 2, "initial_rank": 4}),
        ("p_tuning", {"virtual_tokens": 3, "hidden": 16}),
    ],
)
@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_ends_with_the_same_bits(
    base: Base, tmp_path: Path, kind: str, method: dict[str, Any], cut: int
) -> None:
    config = run_of(kind, optim={"steps": 8, "batch_size": 5}, **method)
    whole, _, steps, _ = _train(base, config)
    _, state, first, ended = _train(base, config, cut=cut)
    assert (ended, len(first)) == ("asked", cut)
    directory = RunDirectory(tmp_path)
    directory.begin(config)
    directory.keep(config, state)
    torch.manual_seed(123)  # what a new process starts with does not matter
    resumed, _, rest, ended = _train(base, config, resume=directory.resume(config))
    assert ended == "steps"
    assert [s.loss for s in (*first, *rest)] == [s.loss for s in steps]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


# In front of a program: its eighth step is the last that it notes.
KILLED = """
import os, signal
from training.run_directory import RunDirectory

note = RunDirectory.note

def note_and_die(self, step):
    note(self, step)
    if step.number == 8:
        os.kill(os.getpid(), signal.SIGKILL)

RunDirectory.note = note_and_die
"""


def test_a_run_that_is_killed_goes_on_and_leaves_the_same_file(
    base_directory: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"word {i * 7}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out: str, *more: str, first: str = "") -> list[str]:
        flags = ["--base", str(base_directory), "--data", str(data), "--out", str(tmp_path / out)]
        sets = ["--set", "checkpoint_every=3", "--set", "method.dropout=0.1"]
        program = f"{first}from training.cli import app; app()"
        return [sys.executable, "-c", program, "run", "--steps", "40", *flags, *sets, *more]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = CliRunner().invoke(app, command("whole")[3:])
    assert whole.exit_code == 0, whole.output
    victim = subprocess.run(command("cut", first=KILLED), env=env, stdout=subprocess.DEVNULL)
    assert victim.returncode == -signal.SIGKILL
    log = tmp_path / "cut" / "run" / "log.jsonl"
    assert log.read_text().count("\n") == 8
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    subprocess.run(command("cut", "--resume"), env=env, check=True, capture_output=True)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    numbers = [json.loads(line)["number"] for line in log.read_text().splitlines()]
    assert numbers == list(range(1, 41))


def test_ctrl_c_leaves_an_adapter_and_a_checkpoint(base_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    program = "from training.cli import app; app()"
    flags = ["--base", str(base_directory), "--data", str(data), "--out", str(tmp_path / "a")]
    run = subprocess.Popen(
        [sys.executable, "-c", program, "run", "--steps", "100000", *flags],
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "a" / "run" / "log.jsonl"
    while not log.exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130
    assert "go on with --resume" in " ".join(said.split())
    assert (tmp_path / "a" / WEIGHTS).exists()
    assert (tmp_path / "a" / "run" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(base: Base, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    config = run_of(optim={"steps": 2})
    with pytest.raises(ConfigError, match="no checkpoint"):
        directory.resume(config)
    directory.begin(config)
    directory.keep(config, _train(base, config)[1])
    with pytest.raises(ConfigError, match=r"another optim.steps 2, now 3$"):
        directory.resume(run_of(optim={"steps": 3}))


def test_a_checkpoint_that_is_older_than_a_field_of_the_schema_goes_on_with_its_default(
    base: Base, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path)
    plain = {"double_quant": False}  # as all bases were before it was a field
    config = run_of(optim={"steps": 2}).model_copy(update=plain)
    directory.begin(config)
    directory.keep(config, _train(base, config)[1])
    kept = read_tree(directory.checkpoint)
    del kept["config"]["optim"]["checkpointing"], kept["config"]["double_quant"]
    write_tree(directory.checkpoint, kept)
    assert directory.resume(config)["progress"]["step"] == 2
    with pytest.raises(ConfigError, match=r"another optim.checkpointing False, now True$"):
        directory.resume(run_of(optim={"steps": 2, "checkpointing": True}).model_copy(update=plain))
    with pytest.raises(ConfigError, match=r"another double_quant False, now True$"):
        directory.resume(config.model_copy(update={"double_quant": True}))
    kept["config"]["optim"]["momentum"] = 0.9  # a field that is no longer there
    write_tree(directory.checkpoint, kept)
    with pytest.raises(ConfigError, match=r"double_quant None, now False; .*optim.momentum 0"):
        directory.resume(config)


def test_patience_ends_a_run_and_the_best_weights_are_kept(base: Base) -> None:
    config = run_of(rank=4, optim={"steps": 60, "learning_rate": 0.3}).model_copy(
        update={
            "eval": TrainConfig.model_fields["eval"].default.model_copy(
                update={"every": 2, "patience": 3}
            )
        }
    )
    held = [Example((200 + i, 300 + i, STOP), 1) for i in range(4)]  # learning does not help there
    torch.manual_seed(0)
    adapter = attach(base, config)
    steps: list[Step] = []
    done = train(base, adapter, PAIRS, held, config, steps.append)
    losses = {s.number: s.eval_loss for s in steps if s.eval_loss is not None}
    assert done.ended == "patience"
    assert done.steps < 60
    assert done.eval_loss == min(losses.values())
    assert done.best_step == min(losses, key=lambda number: losses[number])
    assert mean_loss(base, held, 6, adapter) == pytest.approx(done.eval_loss, rel=1e-6)
    adapter.detach()


def test_a_budget_of_tokens_ends_a_run(base: Base) -> None:
    config = run_of(rank=2).model_copy(
        update={
            "budget": TrainConfig.model_fields["budget"].default.model_copy(update={"tokens": 60})
        }
    )
    _, _, steps, ended = _train(base, config)
    assert ended == "tokens"
    assert len(steps) == 3  # of 6 examples of 4 tokens each


def test_the_cursor_says_where_the_data_stands() -> None:
    stream = Batches(PAIRS, 5, 0, seed=3)
    seen = [next(stream).input_ids for _ in range(8)]
    again = Batches(PAIRS, 5, 0, seed=3)
    for _ in range(4):
        next(again)
    other = Batches(PAIRS, 5, 0, seed=3)
    other.cursor = again.cursor
    assert all(torch.equal(next(other).input_ids, want) for want in seen[4:])


def test_a_plan_counts_and_leaves_the_base_alone(base: Base) -> None:
    before = base.model(input_ids=torch.tensor([[3, 4, 5]])).logits
    plan = make_plan(base, PAIRS, run_of(rank=2, targets=("q_proj",), optim={"steps": 10}))
    shapes = [s for path, s in base.spec.linears.items() if path.endswith("q_proj")]
    assert plan.parameters == sum(2 * (s.in_features + s.out_features) for s in shapes)
    assert (plan.examples, plan.tokens, plan.loss_tokens, plan.longest) == (12, 48, 36, 4)
    assert plan.epochs == 5.0
    assert plan.peak_bytes > 0
    assert plan.seconds_per_step > 0
    assert torch.equal(base.model(input_ids=torch.tensor([[3, 4, 5]])).logits, before)


def test_the_command_shows_the_plan(base_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    result = CliRunner().invoke(
        app, ["plan", "--base", str(base_directory), "--data", str(data), "--set", "optim.steps=7"]
    )
    assert result.exit_code == 0, result.output
    for said in ("steps: 7", "trained parameters", "peak memory", "what bears loss"):
        assert said in result.output


@pytest.mark.parametrize(
    ("setting", "said"),
    [("optim.steps", "field=value"), ("optim.stepz=3", "stepz"), ("seed.x=3", "seed")],
)
def test_a_wrong_setting_is_named(tmp_path: Path, setting: str, said: str) -> None:
    flags = ["--data", "x.jsonl", "--seed", "1", "--set", setting]
    result = CliRunner().invoke(app, ["run", *flags])
    assert result.exit_code == 2
    assert said in result.output


def test_an_earlier_run_is_replaced_only_when_asked_and_resumed_only_with_its_rows(
    base_directory: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) + "\n" for i in range(4)]
    data.write_text("".join(rows))

    def run(*more: str) -> tuple[int, str]:
        flags = ["--base", str(base_directory), "--data", str(data), "--out", str(out)]
        done = CliRunner().invoke(app, ["run", "--steps", "2", *flags, *more])
        return done.exit_code, " ".join(done.output.split())

    assert run()[0] == 0
    first = (out / WEIGHTS).read_bytes()
    (out / "evaluation.json").write_text("{}")  # of that adapter
    status, said = run("--lr", "0.5")
    assert (status, "--overwrite" in said, "--resume" in said) == (2, True, True)
    assert (out / WEIGHTS).read_bytes() == first
    data.write_text("".join(reversed(rows)))
    status, said = run("--resume")
    assert (status, "data.train is not what the checkpoint was made with" in said) == (2, True)
    assert (out / "evaluation.json").exists()
    assert run("--overwrite", "--lr", "0.5")[0] == 0
    assert (out / WEIGHTS).read_bytes() != first
    assert not (out / "evaluation.json").exists(), "it was measured of other weights"
