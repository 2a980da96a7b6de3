"""Two processes make the step that one makes, resume to the bit, and one of them writes."""

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
from safetensors.torch import load_file, save_file

from base.load import Base, load_float
from tests.training.processes import in_two, lose
from tests.training.runs import run_of
from training.config import TrainConfig
from training.data import Example
from training.data.batches import Batches
from training.distributed import ALONE, World, world
from training.errors import ConfigError
from training.interrupts import interrupts
from training.methods import attach
from training.recipe import Run, Step, train
from training.run_directory import RunDirectory
from training.session import check_sharding, has_begun
from training.tree import read_tree, write_tree

ROOT = Path(__file__).parents[2]
STOP = 2
# Of very unlike lengths, so that a mean of two means would be another number; 7 in batches of 3
# leave a batch of one, in which the second process has nothing of its own.
DATA = [Example((5, *range(20 + i, 20 + i + 3 * i), STOP), 1) for i in range(1, 8)]


def _run(
    base: Base,
    config: TrainConfig,
    here: World = ALONE,
    cut: int | None = None,
    resume: Any = None,
) -> tuple[list[torch.Tensor], Any, list[Step]]:
    """Whole weights at the end; the first process's last checkpoint and its steps."""
    if here.sharded:
        here.shard(base.model)
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    kept: list[Any] = []
    steps: list[Step] = []
    seen = {"step": 0}

    def asked() -> bool:
        seen["step"] += 1
        return here.rank == here.size - 1 and seen["step"] == cut  # one alone is asked to stop

    train(
        base,
        adapter,
        DATA,
        DATA[:3],
        config,
        steps.append,
        resume=resume,
        keep=kept.append,
        asked_to_stop=asked,
        world=here,
    )
    weights = adapter.state()["parameters"]
    return weights, kept[-1] if kept else None, steps


def _config(kind: str, out: Path, **method: Any) -> TrainConfig:
    rate = 1e-3 if kind == "full" else 1e-2
    optim = {"steps": 5, "batch_size": 3, "learning_rate": rate}
    config = run_of(kind, optim=optim, **method)
    return config.model_copy(update={"out": out})


def _keep(path: Path, weights: list[torch.Tensor], steps: list[Step]) -> None:
    save_file({str(i): w.contiguous() for i, w in enumerate(weights)}, path)
    lines = [{"loss": s.loss, "tokens": s.tokens, "eval_loss": s.eval_loss} for s in steps]
    path.with_suffix(".json").write_text(json.dumps(lines))


@pytest.mark.parametrize("kind", ["dora", pytest.param("adalora", marks=pytest.mark.slow)])
def test_two_processes_make_the_adapter_that_one_makes(
    base: Base, tmp_path: Path, kind: str
) -> None:
    more = {"initial_rank": 4} if kind == "adalora" else {}
    config = _config(kind, tmp_path, rank=2, **more)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 2})})

    def work(here: World) -> None:
        weights, _, steps = _run(base, config, here)
        _keep(tmp_path / f"{here.rank}.safetensors", weights, steps)

    in_two(work, tmp_path / "two")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone, _, steps = _run(base, config)
    for index, weight in enumerate(alone):
        torch.testing.assert_close(first[str(index)], weight, rtol=1e-3, atol=2e-5)
    said = json.loads((tmp_path / "0.json").read_text())
    assert json.loads((tmp_path / "1.json").read_text()) == []  # the first process reports
    assert [line["tokens"] for line in said] == [step.tokens for step in steps]
    for line, step in zip(said, steps, strict=True):
        assert line["loss"] == pytest.approx(step.loss, rel=1e-5)
        assert (line["eval_loss"] is None) == (step.eval_loss is None)
        assert step.eval_loss is None or line["eval_loss"] == pytest.approx(
            step.eval_loss, rel=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [("lora", False), pytest.param("full", True, marks=pytest.mark.slow)],
)
def test_two_processes_resume_with_the_same_bits(
    base: Base, base_directory: Path, tmp_path: Path, kind: str, sharded: bool
) -> None:
    config = _config(kind, tmp_path, **({} if sharded else {"rank": 2, "dropout": 0.2}))
    config = config.model_copy(update={"base": str(base_directory)})

    def fresh() -> Base:
        return load_float(base_directory, device="cpu") if sharded else base

    def whole(here: World) -> None:
        weights, _, steps = _run(fresh(), config, here)
        _keep(tmp_path / f"whole.{here.rank}.safetensors", weights, steps)

    def cut(here: World) -> None:
        _, kept, steps = _run(fresh(), config, here, cut=2)
        assert len(steps) == (2 if here.leads else 0)
        if here.leads:
            write_tree(tmp_path / "checkpoint.safetensors", kept)

    def rest(here: World) -> None:
        state = read_tree(tmp_path / "checkpoint.safetensors")
        weights, _, steps = _run(fresh(), config, here, resume=state)
        _keep(tmp_path / f"rest.{here.rank}.safetensors", weights, steps)

    for name, work in (("a", whole), ("b", cut), ("c", rest)):
        in_two(work, tmp_path / name, sharded)
    for rank in range(2):
        one = load_file(tmp_path / f"whole.{rank}.safetensors")
        two = load_file(tmp_path / f"rest.{rank}.safetensors")
        assert all(torch.equal(one[name], two[name]) for name in one)
    if sharded:
        alone, _, _ = _run(fresh(), config)
        for index, weight in enumerate(alone):
            torch.testing.assert_close(one[str(index)], weight, rtol=1e-3, atol=2e-5)


def test_a_checkpoint_of_two_processes_is_not_for_one(base: Base) -> None:
    config = run_of(rank=2, optim={"steps": 2})
    state = Run(base, attach(base, config), DATA, config).state()
    state["random"] = state["random"].expand(2, -1)
    with pytest.raises(ConfigError, match="of 2 processes, now 1"):
        Run(base, attach(base, config), DATA, config).restore(state)


def test_a_checkpoint_that_only_one_machine_sees_is_told(tmp_path: Path) -> None:
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "0" / "run" / "checkpoint.safetensors").touch()
    assert [has_begun(ALONE, RunDirectory(tmp_path / name)) for name in "01"] == [True, False]

    def work(here: World) -> None:
        assert has_begun(here, RunDirectory(tmp_path / "0"))
        assert not has_begun(here, RunDirectory(tmp_path / "1"))
        with pytest.raises(ConfigError, match="1 of 2 processes see it"):
            has_begun(here, RunDirectory(tmp_path / str(here.rank)))

    in_two(work, tmp_path / "two")


@pytest.mark.parametrize("pack", [None, 40])
def test_the_shares_are_the_batch(pack: int | None) -> None:
    whole = Batches(DATA, 3, 0, 1, pack)
    shares = [Batches(DATA, 3, 0, 1, pack, (rank, 2)) for rank in range(2)]
    for _ in range(6):
        batch, parts = next(whole), [next(share) for share in shares]
        assert sum(part.tokens for part in parts) == batch.tokens
        assert sum(part.loss_tokens for part in parts) == batch.loss_tokens
        rows = [row[row != 0].tolist() for p in parts if not p.spare for row in p.input_ids]
        assert sorted(rows) == sorted(row[row != 0].tolist() for row in batch.input_ids)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world() is ALONE
    assert ALONE.sums(1.5, 2) == [1.5, 2]


def _launch(config: str, *command: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    file = str(ROOT / "deploy" / "accelerate" / config)
    return [
        *launcher,
        "--config_file",
        file,
        "--main_process_port",
        "0",
        "-m",
        "training",
        *command,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "method", "file"),
    [
        ("ddp.yaml", {"kind": "lora", "rank": 2, "dropout": 0.1}, "adapter_model.safetensors"),
        ("fsdp.yaml", {"kind": "full"}, "model.safetensors"),
    ],
)
def test_accelerate_launches_it_and_a_killed_run_goes_on(
    base_directory: Path, tmp_path: Path, config: str, method: dict[str, Any], file: str
) -> None:
    rows = [{"prompt": f"say {i}", "completion": f"word {i * 7}"} for i in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"--set=method.{key}={value}" for key, value in method.items() if key != "kind"]
    flags = ["run", "--base", str(base_directory), "--data", str(data), "--steps", "60"]
    flags += ["--method", method["kind"], "--batch-size", "5", "--set=checkpoint_every=3", *sets]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        command = _launch(config, *flags, "--out", str(tmp_path / out), *more)
        return subprocess.Popen(command, cwd=ROOT, env=env)

    assert start("whole").wait() == 0
    victim = start("cut")
    log = tmp_path / "cut" / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 7):
        assert victim.poll() is None
        time.sleep(0.01)
    lose(victim.pid)
    victim.wait()
    assert not (tmp_path / "cut" / file).exists()
    assert start("cut", "--resume").wait() == 0
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_fsdp_refuses_an_adapter(base_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = [
        "run",
        "--base",
        str(base_directory),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "a"),
    ]
    done = subprocess.run(
        _launch("fsdp.yaml", *flags), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FSDP with method lora" in " ".join(done.stderr.split())


def test_a_second_signal_of_the_launcher_is_no_second_wish() -> None:
    """A terminal's Ctrl-C reaches every process, and the launcher hands it on once more."""
    with interrupts(once=False) as asked:
        assert not asked()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked()
    with interrupts() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("lora", {"rank": 2}, "FSDP with method lora: .*ddp.yaml is right"),
        ("full", {"embeddings": False}, "method.embeddings must be true"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_sharding(run_of(kind, **more))
