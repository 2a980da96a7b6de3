"""Does a run fit, and what would: foretold from one and two rows, or from the weights alone."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from base.load import Base, load_float
from tests.training.runs import run_of
from training import plan as plan_module
from training.cli import app
from training.data import Example
from training.errors import ConfigError
from training.plan import make_plan, what_would_fit
from training.weights import refuse_too_large, weights

LONG = [Example((5, *range(10, 310), 2), 1) for _ in range(12)]


def _plan(base: Base, free: int | None, monkeypatch: pytest.MonkeyPatch) -> plan_module.Plan:
    if free is not None:
        monkeypatch.setattr(plan_module, "_free", lambda base: free)
    return make_plan(base, LONG, run_of(rank=2, optim={"steps": 10, "batch_size": 12}))


def test_a_batch_that_does_not_fit_is_never_run(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks here are foretold: 100 MB, and 10 MB more for each row."""
    ran: list[int] = []

    def peak_of(run: object, batch: object, rows: int) -> int:
        ran.append(rows)
        return 90_000_000 + rows * 10_000_000

    monkeypatch.setattr(plan_module, "_peak_of", peak_of)
    whole = _plan(base, 250_000_000, monkeypatch)
    assert (whole.peak_bytes, whole.rows_that_fit, whole.too_large) == (210_000_000, 12, False)
    assert max(ran) == 12
    ran.clear()
    some = _plan(base, 155_000_000, monkeypatch)
    assert (some.peak_bytes, some.rows_that_fit, some.too_large) == (210_000_000, 6, True)
    assert max(ran) == 2
    assert "optim.micro_batch_size=6 would fit" in what_would_fit(some, run_of())
    none = _plan(base, 95_000_000, monkeypatch)
    assert (none.rows_that_fit, none.too_large) == (0, True)
    assert "not even one row" in what_would_fit(none, run_of())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets a peak")
def test_the_peak_is_that_of_the_trial(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = torch.ones(128, 1 << 20)  # 512 MiB that are gone again: no part of the peak
    del taken
    lifetime = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = _plan(base, None, monkeypatch)
    assert 0 < found.peak_bytes < lifetime - (256 << 20)
    assert found.rows == found.rows_that_fit == 12
    assert not found.too_large


def test_weights_are_counted_without_loading_them(base_directory: Path) -> None:
    found = weights(str(base_directory))
    whole = load_float(base_directory, device="cpu")
    assert found.linears + found.others == sum(p.numel() for p in whole.model.parameters())
    shapes = [s for s in whole.spec.linears.items() if s[0] != "lm_head"]
    assert found.linears == sum(s.in_features * s.out_features for _, s in shapes)
    plain = weights(str(base_directory), double_quant=False)
    assert plain.served - found.served == found.linears / 64 * (4 - 1 - 4 / 256)


def test_a_base_whose_weights_do_not_fit_is_refused_with_what_would(base_directory: Path) -> None:
    full = run_of("full").model_copy(update={"base": str(base_directory)})
    adapter = run_of().model_copy(update={"base": str(base_directory)})
    found = weights(str(base_directory))
    between = int(found.served) + 1
    refuse_too_large(adapter, between)
    with pytest.raises(ConfigError, match=r"to train all of them.*or method lora over this one"):
        refuse_too_large(full, between)
    with pytest.raises(ConfigError, match=r"over them in NF4, and .* free; a base of"):
        refuse_too_large(adapter, between - 2)


def test_the_command_refuses_before_it_loads(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.weights._free", lambda: 1000)
    monkeypatch.setattr("training.session.load_for", lambda config: pytest.fail("it was loaded"))
    said = CliRunner().invoke(app, ["plan", "--base", str(base_directory), "--data", "x.jsonl"])
    assert said.exit_code == 2
    assert "are free" in " ".join(said.output.split())
