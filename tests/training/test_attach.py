from __future__ import annotations

import pytest
import torch

from base.load import Base
from training.attach import attach, detach, targets
from training.config import MethodConfig
from training.errors import MethodError
from training.layers import DoraLinear


def test_all_linear_means_every_quantised_linear(base: Base) -> None:
    quantised = {path for path, shape in base.spec.linears.items() if shape.quantized}
    assert set(targets(base, ("all-linear",))) == quantised


def test_only_the_adapter_trains(base: Base) -> None:
    layers = attach(base, MethodConfig(kind="dora", rank=2, targets=("q_proj",)))
    assert sorted(layers) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    trained = {name for name, p in base.model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{name}" for path in layers for name in ("A", "B", "m")}
    assert all(isinstance(layer, DoraLinear) for layer in layers.values())


def test_detach_gives_the_base_back(base: Base) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    before = base.model(input_ids=prompt).logits
    layers = attach(base, MethodConfig(rank=2))
    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_()
    assert not torch.allclose(base.model(input_ids=prompt).logits, before, atol=1e-2)
    detach(base, layers)
    assert torch.equal(base.model(input_ids=prompt).logits, before)


def test_a_target_that_fits_nothing_is_refused(base: Base) -> None:
    with pytest.raises(MethodError, match=r"query_proj.*q_proj"):
        attach(base, MethodConfig(targets=("query_proj",)))
