"""Full fine-tuning: every weight learns, and what is saved is a base that loads and is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from base.load import Base, load_base, load_float
from base.nf4 import NF4Linear
from tests.training.runs import run_of
from training.config import TrainConfig
from training.data import Example
from training.errors import MethodError
from training.methods import attach
from training.recipe import Step, mean_loss, train

STOP = 2
PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(12)]


def _config(base_directory: Path, out: Path, **method: Any) -> TrainConfig:
    config = run_of("full", optim={"steps": 8, "batch_size": 5, "learning_rate": 1e-3}, **method)
    return config.model_copy(update={"base": str(base_directory), "out": out})


def _train(
    base: Base, config: TrainConfig, cut: int | None = None, resume: Any = None
) -> tuple[Any, Any, list[float]]:
    torch.manual_seed(config.seed)
    weights = attach(base, config)
    kept: list[Any] = []
    steps: list[Step] = []
    train(
        base,
        weights,
        PAIRS,
        (),
        config,
        steps.append,
        resume=resume,
        keep=kept.append,
        asked_to_stop=lambda: cut is not None and steps[-1].number == cut,
    )
    return weights, kept[-1], [step.loss for step in steps]


def test_a_float_base_is_the_checkpoint_itself(base_directory: Path) -> None:
    from safetensors.torch import load_file

    float_base = load_float(base_directory, device="cpu")
    stored = load_file(base_directory / "model.safetensors")
    assert not any(isinstance(m, NF4Linear) for m in float_base.model.modules())
    for name, tensor in float_base.model.state_dict().items():
        if name in stored:
            assert torch.equal(tensor, stored[name].float()), name
    assert not any(shape.quantized for shape in float_base.spec.linears.values())


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_every_weight_learns_and_the_saved_base_says_the_same(
    base_directory: Path, tmp_path: Path, store: str
) -> None:
    base = load_float(base_directory, device="cpu")
    before = mean_loss(base, PAIRS, 6)
    start = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    weights, _, _ = _train(base, _config(base_directory, tmp_path / "new", store=store))
    after = mean_loss(base, PAIRS, 6)
    assert after < before - 0.5
    assert all(not torch.equal(start[n], p) for n, p in base.model.named_parameters())
    weights.save(tmp_path / "new")
    again = load_float(tmp_path / "new", device="cpu")
    assert again.spec.fingerprint != base.spec.fingerprint
    assert mean_loss(again, PAIRS, 6) == pytest.approx(
        after, abs=1e-6 if store == "float32" else 5e-2
    )
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == store
    served = load_base(tmp_path / "new", device="cpu", dtype="float32", keep=False)
    assert mean_loss(served, PAIRS, 6) == pytest.approx(after, abs=0.3)
    said = served.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert said == base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )


def test_a_resumed_run_ends_with_the_same_bits(base_directory: Path, tmp_path: Path) -> None:
    config = _config(base_directory, tmp_path)

    def fresh() -> Base:
        return load_float(base_directory, device="cpu")

    whole, _, losses = _train(fresh(), config)
    _, state, first = _train(fresh(), config, cut=3)
    resumed, _, rest = _train(fresh(), config, resume=state)
    assert first + rest == losses
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_embeddings_stay_where_they_are_to_stay(base_directory: Path, tmp_path: Path) -> None:
    base = load_float(base_directory, device="cpu")
    table = base.model.get_input_embeddings().weight
    start = table.detach().clone()
    _train(base, _config(base_directory, tmp_path, embeddings=False))
    assert torch.equal(table, start)


def test_a_base_in_nf4_and_its_own_directory_are_refused(
    base: Base, base_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(MethodError, match=r"floating point.*load_float"):
        attach(base, _config(base_directory, tmp_path))
    with pytest.raises(MethodError, match="name another directory"):
        attach(load_float(base_directory, device="cpu"), _config(base_directory, base_directory))
