"""Every method of the registry trains over NF4, saves what PEFT reads, and is served as trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from base.load import Base
from tests.oracle import PeftOracle, relative_error
from tests.training.runs import run_of
from training import checkpoint
from training.data import Example
from training.errors import MethodError
from training.methods import METHODS, attach
from training.methods.low_rank import LowRankAdapter
from training.recipe import mean_loss, train

STOP = 2
PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(6)]
TOKENS = [3, 40, 41, 42, 99, 7, 300, 301]
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "initial_rank": 6},
    "vblora": {"vectors": 16, "vector_length": 16},
    "oft": {"block_size": 16},
    "waveft": {"coefficients": 64},
    "prompt_tuning": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 4, "hidden": 32},
    "prefix_tuning": {"virtual_tokens": 4},
}
RATE = {"oft": 3e-2, "vera": 1e-1, "ia3": 1e-1, "vblora": 1e-1, "prefix_tuning": 1e-1}


def _logits(base: Base, adapter: Any) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([TOKENS])
        columns = torch.arange(len(TOKENS))
        logits: torch.Tensor = adapter.logits(tokens, torch.ones_like(tokens), columns)[0]
    return logits


@pytest.mark.parametrize("kind", [name for name, row in METHODS.items() if not row.makes_base])
def test_it_learns_is_saved_and_peft_reads_the_same(
    base: Base, base_directory: Path, tmp_path: Path, kind: str
) -> None:
    frozen = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    config = run_of(
        kind, optim={"steps": 20, "learning_rate": RATE.get(kind, 2e-2)}, **OPTIONS.get(kind, {})
    )
    torch.manual_seed(0)
    adapter = attach(base, config)
    before = mean_loss(base, PAIRS, 6, adapter)
    done = train(base, adapter, PAIRS, PAIRS, config, lambda step: None)
    assert done.eval_loss is not None
    assert done.eval_loss < before - 0.01
    trained = _logits(base, adapter)
    adapter.save(tmp_path)
    adapter.detach()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    assert relative_error(trained, PeftOracle(base_directory, tmp_path).logits(TOKENS)) < 1e-4

    again = checkpoint.load(tmp_path, base)
    assert relative_error(_logits(base, again), trained) < 1e-5
    again.detach()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_start_at_the_bases_directions_changes_nothing_yet_and_is_saved_at_twice_the_rank(
    base: Base, base_directory: Path, tmp_path: Path, kind: str, init: str
) -> None:
    adapter = attach(base, run_of(kind, rank=4, init=init))
    assert isinstance(adapter, LowRankAdapter)
    plain = _logits(base, adapter)
    with torch.no_grad():
        for layer in adapter.layers.values():
            assert layer.B.abs().max() > 0
            layer.B.mul_(1.1)
    moved = _logits(base, adapter)
    assert relative_error(moved, plain) > 1e-2
    adapter.save(tmp_path)
    adapter.detach()
    with torch.no_grad():
        without = base.model(input_ids=torch.tensor([TOKENS])).logits[0]
    assert relative_error(plain, without) < 1e-4
    oracle = PeftOracle(base_directory, tmp_path)
    assert relative_error(moved, oracle.logits(TOKENS)) < 1e-4


def test_lora_plus_gives_b_a_rate_of_its_own(base: Base) -> None:
    config = run_of(rank=2, optim={"steps": 1, "b_rate_ratio": 16.0})
    adapter = attach(base, config)
    assert isinstance(adapter, LowRankAdapter)
    slow, fast = adapter.groups(16.0)
    assert {id(p) for p in fast["params"]} == {id(layer.B) for layer in adapter.layers.values()}
    assert len(slow["params"]) + len(fast["params"]) == len(adapter.parameters())
    assert (slow["ratio"], fast["ratio"]) == (1.0, 16.0)
    adapter.detach()


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("vblora", {"vector_length": 7}, "vector_length 7"),
        ("oft", {"block_size": 7}, "block_size 7"),
        ("adalora", {"rank": 9, "initial_rank": 3}, "initial_rank 3"),
        ("ia3", {"targets": ("nowhere",)}, "nowhere"),
        ("ln_tuning", {"targets": ("nowhere",)}, "nowhere"),
        ("lora", {"rank": 250, "init": "pissa"}, "rank 250"),
    ],
)
def test_what_the_base_has_no_place_for_is_refused(
    base: Base, kind: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(MethodError, match=said):
        attach(base, run_of(kind, **fields))
    base.model(input_ids=torch.tensor([TOKENS]))  # still whole


def test_a_b_rate_is_refused_where_there_is_no_b(base: Base) -> None:
    adapter = attach(base, run_of("ia3"))
    with pytest.raises(MethodError, match="b_rate_ratio"):
        adapter.groups(4.0)
    adapter.detach()
