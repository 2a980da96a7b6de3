"""Optimisers that bitsandbytes brings: what works on a CPU resumes there, the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base.load import Base
from tests.training.runs import run_of
from training.data import Example
from training.errors import ConfigError
from training.methods import attach
from training.recipe import Run
from training.run_directory import RunDirectory

PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, 2), 1) for i in range(12)]
# 8-bit moments begin at 4,096 values; below, bitsandbytes keeps them whole
METHOD = {"rank": 64, "dropout": 0.1}


def test_moments_of_a_byte_learn_and_resume_to_the_bit(base: Base, tmp_path: Path) -> None:
    config = run_of(optim={"steps": 12, "kind": "adamw_8bit"}, **METHOD)
    torch.manual_seed(0)
    adapter = attach(base, config)
    run = Run(base, adapter, PAIRS, config)
    moments = [run.step() for _ in range(6)] and next(iter(run.optimizer.state.values()))
    assert moments["state1"].dtype is torch.uint8
    directory = RunDirectory(tmp_path)
    directory.begin(config)
    directory.keep(config, run.state())
    rest = [run.step().loss for _ in range(6)]
    assert rest[-1] < run.progress.losses[0] - 0.5
    adapter.detach()

    torch.manual_seed(5)
    fresh = attach(base, config)
    again = Run(base, fresh, PAIRS, config)
    again.restore(directory.resume(config))
    assert [again.step().loss for _ in range(6)] == rest
    for one, other in zip(adapter.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    fresh.detach()


@pytest.mark.parametrize(
    ("kind", "right"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")]
)
def test_paging_is_refused_without_a_gpu(base: Base, kind: str, right: str) -> None:
    config = run_of(optim={"kind": kind})
    adapter = attach(base, config)
    with pytest.raises(ConfigError, match=f"on cpu; {right} is right"):
        Run(base, adapter, PAIRS, config)
    adapter.detach()
