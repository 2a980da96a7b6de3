from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from adapters.limits import Limits
from adapters.validate import validate
from base.load import load_base
from service.bench.random_adapters import assortment, random_adapters
from tests.oracle import PeftOracle, relative_error


def test_each_is_accepted_says_something_and_differs(
    base_directory: Path, adapters: tuple[Path, ...]
) -> None:
    spec = load_base(base_directory, device="cpu").spec
    tokens = list(range(40, 60))
    logits = [PeftOracle(base_directory).logits(tokens)]
    for adapter in adapters[:2]:
        found = validate(
            (adapter / "adapter_config.json").read_bytes(),
            adapter / "adapter_model.safetensors",
            spec,
            Limits(),
        )
        assert (found.kind, found.rank, len(found.targets)) == ("lora", 4, 14)
        logits.append(PeftOracle(base_directory, adapter).logits(tokens))
    assert relative_error(logits[1], logits[0]) > 1e-3
    assert relative_error(logits[2], logits[1]) > 1e-3


def test_every_kind_of_the_assortment_passes_the_checks(
    base_directory: Path, tmp_path: Path
) -> None:
    spec = load_base(base_directory, device="cpu").spec
    made = random_adapters(tmp_path, spec, 32, 4)
    found = [
        validate(
            (adapter / "adapter_config.json").read_bytes(),
            adapter / "adapter_model.safetensors",
            spec,
            Limits(),
        )
        for adapter in made
    ]
    wanted = assortment(4)
    assert [(each.kind, each.rank) for each in found[:16]] == [("lora", 4)] * 8 + [("dora", 4)] * 8
    assert [each.kind for each in found] == [sort.kind for sort in wanted]
    assert len({each.rank for each in found}) > 4


def test_all_of_them_differ(adapters: tuple[Path, ...]) -> None:
    firsts = [
        next(iter(load_file(path / "adapter_model.safetensors").values())) for path in adapters
    ]
    assert len(firsts) == 8
    assert not any(torch.equal(firsts[0], other) for other in firsts[1:])
