from __future__ import annotations

import pytest
import torch

from base.load import Base
from tests.training.runs import run_of
from training.config import MethodConfig
from training.errors import MethodError
from training.layers import DoraLinear
from training.methods import attach
from training.methods.low_rank import LowRankAdapter
from training.methods.targets import targets


def test_all_linear_means_every_quantised_linear(base: Base) -> None:
    quantised = {path for path, shape in base.spec.linears.items() if shape.quantized}
    assert set(targets(base, ("all-linear",))) == quantised


def test_only_the_adapter_trains(base: Base) -> None:
    layers = LowRankAdapter(base, MethodConfig(kind="dora", rank=2, targets=("q_proj",))).layers
    assert sorted(layers) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    trained = {name for name, p in base.model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{name}" for path in layers for name in ("A", "B", "m")}
    assert all(isinstance(layer, DoraLinear) for layer in layers.values())


def test_detach_gives_the_base_back(base: Base) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    before = base.model(input_ids=prompt).logits
    adapter = LowRankAdapter(base, MethodConfig(rank=2))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B.normal_()
    assert not torch.allclose(base.model(input_ids=prompt).logits, before, atol=1e-2)
    adapter.detach()
    assert torch.equal(base.model(input_ids=prompt).logits, before)


def test_a_target_that_fits_nothing_is_refused(base: Base) -> None:
    with pytest.raises(MethodError, match=r"query_proj.*q_proj"):
        attach(base, run_of(targets=("query_proj",)))
