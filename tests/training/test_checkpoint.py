from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from base.load import Base
from tests.oracle import PeftOracle, make_adapter, relative_error
from training import checkpoint
from training.config import MethodConfig
from training.errors import MethodError
from training.methods.files import WEIGHTS
from training.methods.low_rank import LowRankAdapter

TOKENS = [3, 40, 41, 42, 99, 7, 300, 301]
KINDS = ("lora", "rslora", "dora")


def _random(base: Base, config: MethodConfig) -> LowRankAdapter:
    adapter = LowRankAdapter(base, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def _logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = base.model(input_ids=torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_peft_reads_what_training_saved(
    base: Base, base_directory: Path, tmp_path: Path, kind: str, targets: tuple[str, ...]
) -> None:
    config = MethodConfig.model_validate({"kind": kind, "rank": 4, "alpha": 6, "targets": targets})
    adapter = _random(base, config)
    trained = _logits(base)
    adapter.save(tmp_path / "a")
    oracle = PeftOracle(base_directory, tmp_path / "a")
    assert relative_error(trained, oracle.logits(TOKENS)) < 1e-5
    adapter.detach()
    assert relative_error(_logits(base), trained) > 1e-2  # the adapter says something


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_the_one_that_peft_itself_would_save(
    base: Base, base_directory: Path, tmp_path: Path, kind: str
) -> None:
    theirs = make_adapter(tmp_path / "theirs", base_directory, kind, rank=4, alpha=6)
    config = MethodConfig.model_validate({"kind": kind, "rank": 4, "alpha": 6})
    LowRankAdapter(base, config).save(tmp_path / "ours")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(path / WEIGHTS).items()}
        for path in (tmp_path / "ours", theirs)
    ]
    assert shapes[0] == shapes[1]
    # As PEFT reads them: what a file does not say is PEFT's default.
    read = [PeftConfig.from_pretrained(str(path)).to_dict() for path in (tmp_path / "ours", theirs)]
    for each in read:
        each.pop("base_model_name_or_path")
        each.pop("peft_version", None)
    assert read[0] == read[1]


def test_the_checkpoint_names_its_base(base: Base, tmp_path: Path) -> None:
    config = MethodConfig(rank=2)
    LowRankAdapter(base, config).save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()["base_fingerprint"] == base.spec.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_load_attaches_the_same_adapter(base: Base, tmp_path: Path, kind: str) -> None:
    config = MethodConfig.model_validate({"kind": kind, "rank": 4, "alpha": 6})
    adapter = _random(base, config)
    trained = _logits(base)
    adapter.save(tmp_path)
    adapter.detach()
    again = checkpoint.load(tmp_path, base)
    assert torch.equal(_logits(base), trained)
    again.detach()


def test_load_refuses_left_over_and_missing_tensors(base: Base, tmp_path: Path) -> None:
    config = MethodConfig(rank=4, targets=("q_proj",))
    adapter = LowRankAdapter(base, config)
    adapter.save(tmp_path)
    adapter.detach()
    whole = load_file(tmp_path / WEIGHTS)
    first = next(iter(whole))
    for wrong in (
        {**whole, "base_model.model.lm_head.lora_A.weight": torch.zeros(1)},
        {name: tensor for name, tensor in whole.items() if name != first},
        {**whole, first: torch.zeros(3, 3)},
    ):
        save_file(wrong, tmp_path / WEIGHTS)
        with pytest.raises(MethodError, match="does not fit"):
            checkpoint.load(tmp_path, base)
