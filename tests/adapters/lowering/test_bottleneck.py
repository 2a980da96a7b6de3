"""Bottleneck adapters of AdapterHub, through validation, lowering and a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.delta import Bottleneck
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.methods import METHODS
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.lowering.bottleneck_oracle import (
    HOULSBY,
    PARALLEL,
    PFEIFFER,
    BottleneckOracle,
    make_bottleneck,
)
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    PeftOracle,
    edit_adapter,
    make_adapter,
    make_base,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
BOUND = 1e-5  # of logits, relative

PLUS = {  # AdapterHub's AdapterPlusConfig, which only runs where it runs the residual itself
    **PFEIFFER,
    "original_ln_after": False,
    "residual_before_ln": False,
    "scaling": "channel",
    "non_linearity": "gelu",
    "stochastic_depth": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "Houlsby": HOULSBY,
    "Pfeiffer": PFEIFFER,
    "parallel": PARALLEL,
    "parallel everywhere, wide, learned scale": {
        **PARALLEL,
        "mh_adapter": True,
        "reduction_factor": 0.5,
        "scaling": "learned",
    },
    "Pfeiffer, the stream in the residual too": {**PFEIFFER, "residual_before_ln": False},
    "sizes by layer, some left out": {
        **HOULSBY,
        "reduction_factor": {"1": 1000, "default": 8},
        "leave_out": [0],
        "scaling": "channel",
        "non_linearity": "LeakyReLU",
    },
}
NATIVE: dict[str, dict[str, Any]] = {
    "AdapterPlus": PLUS,
    "the stream leaves": {**HOULSBY, "original_ln_after": False},
    "parallel, the stream leaves": {**PARALLEL, "original_ln_after": False},
}
CASES = [(a, v) for a in ("llama", "qwen3") for v in VARIANTS]
CASES += [("llama", v) for v in NATIVE] + [("mistral", "Pfeiffer"), ("qwen2", "Houlsby")]


@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_equals_the_equation_in_a_mixed_batch(
    architecture: str, variant: str, server: Servers, tmp_path: Path
) -> None:
    served = server(architecture)
    config = {**VARIANTS, **NATIVE}[variant]
    adapter = make_bottleneck(tmp_path / "a", served.directory, config)
    lora = make_adapter(tmp_path / "lora", served.directory, "lora", seed=1)
    other = make_bottleneck(tmp_path / "b", served.directory, HOULSBY, seed=5)
    directories = [lora, adapter, None, other, adapter]
    lowered = {d: served.lower(d) for d in (lora, adapter, other)}
    prompts = [random_tokens(n, seed=n) for n in (5, 17, 9, 3, 11)]
    got = served.run(
        [(p, lowered[d] if d else None) for p, d in zip(prompts, directories, strict=True)]
    )
    oracles = {d: BottleneckOracle(served.directory, d) for d in (adapter, other)}
    oracles |= {d: PeftOracle(served.directory, d) for d in (lora, None)}
    for logits, prompt, directory in zip(got, prompts, directories, strict=True):
        assert relative_error(logits, oracles[directory].logits(prompt)) < BOUND
    assert relative_error(got[1], oracles[None].logits(prompts[1])) > 1e-2


@pytest.mark.parametrize("variant", ["Houlsby", "Pfeiffer", "parallel"])
def test_as_initialised_it_equals_the_base(variant: str, server: Servers, tmp_path: Path) -> None:
    served, tokens = server("llama"), random_tokens(20)
    adapter = make_bottleneck(tmp_path / "a", served.directory, VARIANTS[variant], zero=True)
    got = served.run([(tokens, served.lower(adapter)), (tokens, None)])
    assert relative_error(got[0], got[1]) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_what_the_lowered_adapter_holds(
    variant: str, server: Servers, tmp_path: Path
) -> None:
    served = server("llama")
    adapter = make_bottleneck(tmp_path / "a", served.directory, VARIANTS[variant])
    lowered, manifest = served.lower(adapter), read_manifest(adapter, served.base.spec)
    assert manifest.memory_bytes == lowered.nbytes
    assert (manifest.kind, manifest.rank) == ("bottleneck", lowered.rank)


def test_the_registry_says_what_one_target_costs(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    config = {**PFEIFFER, "leave_out": [1]}
    lowered = served.lower(make_bottleneck(tmp_path / "a", served.directory, config))
    (delta,) = lowered.deltas.values()
    assert isinstance(delta, Bottleneck)
    row, numbers = METHODS["BOTTLENECK"], {"m": 64, "r": lowered.rank}
    assert lowered.nbytes == eval(row.memory, {}, numbers)
    vectors = 2 * (delta.down_bias.numel() + delta.up_bias.numel())  # added, φ taken, added
    products = 2 * (delta.down.numel() + delta.up.numel())
    assert products + vectors == eval(row.flops, {}, numbers)


def test_a_file_of_the_bare_model_has_no_root(server: Servers, tmp_path: Path) -> None:
    served, tokens = server("llama"), random_tokens(9)
    lowered = [
        served.lower(make_bottleneck(tmp_path / name, served.directory, HOULSBY, root=root))
        for name, root in (("a", "model."), ("b", ""))
    ]
    assert relative_error(*served.run([(tokens, each) for each in lowered])) < 1e-6


def test_before_version_one_gelu_was_another(server: Servers, tmp_path: Path) -> None:
    """adapter-transformers called gelu_new gelu; AdapterHub still reads its files so."""
    served = server("llama")
    config = {**HOULSBY, "non_linearity": "gelu"}
    adapter = make_bottleneck(tmp_path / "a", served.directory, config)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert read_manifest(adapter, served.base.spec).config["non_linearity"] == "gelu"
    del saved["version"]
    (adapter / "adapter_config.json").write_text(json.dumps(saved))
    assert read_manifest(adapter, served.base.spec).config["non_linearity"] == "gelu_new"


def test_merged_placement_is_refused(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_bottleneck(tmp_path / "a", served.directory, HOULSBY)
    with pytest.raises(InvalidAdapter, match="not linear") as caught:
        served.lower(adapter, placement="merged")
    assert caught.value.where == "placement"


# --- what is refused


@pytest.fixture
def saved(server: Servers, tmp_path: Path) -> Path:
    return make_bottleneck(tmp_path / "a", server("llama").directory, HOULSBY)


@pytest.fixture
def spec(server: Servers) -> BaseSpec:
    return server("llama").base.spec


def refusal(saved: Path, spec: BaseSpec) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        read_manifest(saved, spec)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "lora"),
        ("mh_adapter", None),
        ("mh_adapter", "yes"),
        ("non_linearity", "prelu"),
        ("non_linearity", ["relu"]),
        ("non_linearity", None),
        ("reduction_factor", None),
        ("reduction_factor", {"0": 2}),
        ("reduction_factor", 1e-300),
        ("original_ln_before", 1),
        ("ln_before", True),
        ("ln_after", True),
        ("use_gating", True),
        ("residual_before_ln", "post_add"),
        ("inv_adapter", "nice"),
        ("leave_out", "0"),
        ("phm_layer", True),
        ("scaling", "other"),
        ("scaling", {}),
        ("twist", 1),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    field: str, value: Any, saved: Path, spec: BaseSpec
) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())["config"]
    edit_adapter(saved, config={"config": config | {field: value}})
    assert refusal(saved, spec).where == f"config.{field}"


@pytest.mark.parametrize("factor", [0, -1, "2", True, {}, {"0": 0}, {"x": 2}])
def test_a_reduction_is_a_number_above_zero(factor: Any, saved: Path, spec: BaseSpec) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())["config"]
    edit_adapter(saved, config={"config": config | {"reduction_factor": factor}})
    assert refusal(saved, spec).where.startswith("config.reduction_factor")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen3"),
        ("model_type", None),
        ("name", "a.b"),
        ("name", None),
        ("name", 5),
        ("twist", 1),
    ],
)
def test_a_field_beside_the_config_is_named(
    field: str, value: Any, saved: Path, spec: BaseSpec
) -> None:
    edit_adapter(saved, config={field: value})
    assert refusal(saved, spec).where == field


def test_nothing_anywhere_is_refused(saved: Path, spec: BaseSpec) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())["config"]
    edit_adapter(saved, config={"config": config | {"leave_out": [0, 1]}})
    assert refusal(saved, spec).where == "config.mh_adapter"


def test_the_stream_stays_where_the_model_adds_it(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    config = {**HOULSBY, "original_ln_after": False}
    adapter = make_bottleneck(tmp_path / "a", served.directory, config)
    assert refusal(adapter, served.base.spec).where == "config.original_ln_after"


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """Gemma's blocks have norms after the layers, so AdapterHub's places are others there."""
    base = make_base(tmp_path / "base", "gemma")
    served = Server(base)
    adapter = make_bottleneck(tmp_path / "a", base, HOULSBY)
    error = refusal(adapter, served.base.spec)
    assert (error.where, "this base is a gemma" in error.reason) == ("model_type", True)


def test_each_tensor_is_named_that_is_missing_or_wrong(
    saved: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    config = (saved / "adapter_config.json").read_bytes()
    tensors = load_file(str(saved / "adapter_model.safetensors"))
    file = tmp_path / "w"
    for name, tensor in list(tensors.items())[:5]:
        for wrong in (None, torch.cat([tensor, tensor]), tensor * torch.nan):
            kept = {k: v for k, v in tensors.items() if k != name}
            save_file(kept if wrong is None else kept | {name: wrong}, str(file))
            with pytest.raises(InvalidAdapter) as caught:
                validate(config, file, spec, Limits())
            assert caught.value.where == name
    more = "model.invertible_adapters.mine.F.0.weight"
    save_file(tensors | {more: torch.ones(3)}, str(file))
    with pytest.raises(InvalidAdapter, match="left over") as caught:
        validate(config, file, spec, Limits())
    assert caught.value.where == more
