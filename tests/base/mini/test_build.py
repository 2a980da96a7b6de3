from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from base.mini import MINI, packing
from base.mini.build import Budget, build, rate

PHASES = (packing.Phase(0.5, 2, 64, 0.0, 0.5), packing.Phase(1.0, 1, 96, 1.0, 0.0))


@pytest.fixture(autouse=True, scope="module")
def _short_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PHASES", PHASES)
        patch.setattr(packing, "WARM_UP", 0)
        yield


def _build(out: Path, stop_at: int | None = None, resume: bool = False) -> None:
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
    build(out, 3, Budget(steps=4), resume=resume, stop_at=stop_at, compiled=False)


def _tensors(out: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(out / "run" / "checkpoint" / "tensors")
    return tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    _build(out)
    return out


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    _build(tmp_path, stop_at=2)
    broken = _tensors(tmp_path)
    _build(tmp_path, resume=True)
    unbroken, resumed = _tensors(whole), _tensors(tmp_path)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert not all(torch.equal(broken[name], resumed[name]) for name in broken)


def test_biases_train(whole: Path) -> None:
    tensors = _tensors(whole)
    biases = [t for name, t in tensors.items() if name.startswith("model.") and "bias" in name]
    assert len(biases) == 16
    assert all(bias.abs().max() > 0 for bias in biases)


def test_a_build_leaves_the_files_of_a_base(whole: Path) -> None:
    shipped = {"config.json", "generation_config.json", "model.safetensors", "training.json"}
    assert shipped <= {path.name for path in whole.iterdir()}
    stored = load_file(whole / "model.safetensors")
    trained = _tensors(whole)
    assert all(torch.equal(t, trained[f"model.{n}"].bfloat16()) for n, t in stored.items())


def test_another_seed_is_refused_on_resume(whole: Path) -> None:
    with pytest.raises(ValueError, match="seed 3, not 4"):
        build(whole, 4, Budget(steps=4), resume=True, compiled=False)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    assert rate(0, 0.0) < rate(20, 0.0) < rate(200, 0.1) == rate(900, 0.4)
    assert rate(900, 0.4) > rate(900, 0.9) > rate(900, 1.0) == 0.0


def test_a_budget_of_minutes_ends_the_schedule_in_time() -> None:
    assert Budget(steps=100).progress(50, 1e9) == 0.5
    assert Budget(steps=100, minutes=1.0).progress(10, 45.0) == 0.75
    assert Budget(steps=100, minutes=1.0).progress(10, 90.0) == 1.0
