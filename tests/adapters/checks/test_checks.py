"""The checks of every method but LoRA: each tensor by name, each field of PEFT's config class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from adapters.checks import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    miss,
    oft,
    peanut,
    poly,
    prefix,
    pvera,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.validate import CHECKERS, validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver
from tests.oracle import VIRTUAL_KINDS

RULES = {
    "ia3": ia3.RULES,
    "loha": loha.RULES,
    "adalora": adalora.RULES,
    "ln_tuning": ln_tuning.RULES,
    "beft": beft.RULES,
    "miss": miss.RULES,
    "oft": oft.RULES,
    "boft": boft.RULES,
    "road": road.RULES,
    "shira": shira.RULES,
    "peanut": peanut.RULES,
    "poly": poly.RULES,
    "vblora": vblora.RULES,
    "vera": vera.RULES,
    "glora": glora.RULES,
    "lokr": lokr.RULES,
    "pvera": pvera.RULES,
    "tinylora": tinylora.RULES,
    "supertuning": supertuning.RULES,
    "unilora": unilora.RULES,
    "waveft": waveft.RULES,
    "c3a": c3a.RULES,
    "deft": deft.RULES,
    "delora": delora.RULES,
    "fourierft": fourierft.RULES,
    "gralora": gralora.RULES,
    "hira": hira.RULES,
    "hra": hra.RULES,
    "randlora": randlora.RULES,
    **{method.lower(): rules for method, rules in prefix.RULES_OF.items()},
}
TARGETS: dict[str, list[str]] = {"ln_tuning": ["input_layernorm"]}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj."
D0 = "base_model.model.model.layers.0.mlp.down_proj."


def saved_by(save: Saver, kind: str, **options: Any) -> Saved:
    return save(kind, **{"targets": TARGETS.get(kind, ["q_proj", "down_proj"]), **options})


def refusal(config: bytes, weights: Path, spec: BaseSpec) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        validate(config, weights, spec, Limits())
    return caught.value


def is_copy(kind: str, name: str) -> bool:
    """PEFT saves RandLoRA's shared matrices with each layer once more, and zeros for GLoRA."""
    copies = ("proj.randlora_A", "proj.randlora_B", ".zeros")
    return kind in ("randlora", "glora") and name.endswith(copies)


def test_each_method_is_here() -> None:
    elsewhere = {"LORA", "TRAINABLE_TOKENS", "BOTTLENECK"}
    assert {kind.upper() for kind in RULES} | elsewhere == set(CHECKERS)


@pytest.mark.parametrize("kind", RULES)
def test_every_field_of_peft_s_config_has_a_rule(kind: str) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
    assert {field.name for field in dataclasses.fields(config)} <= RULES[kind].keys()


@pytest.mark.parametrize("kind", RULES)
def test_an_unknown_field_is_refused(kind: str, save: Saver, spec: BaseSpec) -> None:
    saved = saved_by(save, kind)
    assert refusal(saved.with_fields(twist=1), saved.weights, spec).where == "twist"
    validate(saved.with_fields(twist=None), saved.weights, spec, Limits())


@pytest.mark.parametrize("kind", RULES)
def test_each_missing_tensor_is_named(
    kind: str, save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    saved = saved_by(save, kind, modules_to_save=["lm_head"])
    tensors = load_file(str(saved.weights))
    for name in tensors:
        if is_copy(kind, name):
            continue
        save_file({k: v for k, v in tensors.items() if k != name}, str(tmp_path / "w"))
        assert refusal(saved.config, tmp_path / "w", spec).where == name


@pytest.mark.parametrize("kind", RULES)
def test_each_wrong_shape_is_named(kind: str, save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = saved_by(save, kind, modules_to_save=["lm_head"])
    tensors = load_file(str(saved.weights))
    for name, tensor in tensors.items():
        longer = torch.cat([tensor, tensor[:1]])
        save_file(tensors | {name: longer}, str(tmp_path / "w"))
        error = refusal(saved.config, tmp_path / "w", spec)
        assert error.where == name
        assert f"shape {list(longer.shape)}, expected {list(tensor.shape)}" in error.reason


@pytest.mark.parametrize("kind", RULES)
def test_a_left_over_tensor_is_named(
    kind: str, save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    saved = saved_by(save, kind)
    name = f"{Q0}lora_magnitude_vector"
    save_file(load_file(str(saved.weights)) | {name: torch.ones(64)}, str(tmp_path / "w"))
    error = refusal(saved.config, tmp_path / "w", spec)
    assert (error.where, "left over" in error.reason) == (name, True)


@pytest.mark.parametrize("kind", RULES)
def test_numbers_are_finite(kind: str, save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = saved_by(save, kind)
    tensors = load_file(str(saved.weights))
    for name, tensor in tensors.items():
        bad = tensor.clone()
        bad.view(-1)[-1] = float("nan") if tensor.is_floating_point() else -1
        save_file(tensors | {name: bad}, str(tmp_path / "w"))
        assert refusal(saved.config, tmp_path / "w", spec).where == name


# kind, options of the adapter, fields overwritten, the field that is named
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (kind, {}, {"task_type": "SEQ_CLS"}, "task_type") for kind in RULES
]
REFUSED += [
    (kind, {}, {"target_modules": None}, "target_modules")
    for kind in RULES
    if kind not in VIRTUAL_KINDS
]
REFUSED += [(kind, {}, {"target_modules": ["nothing"]}, "target_modules") for kind in RULES]
REFUSED += [(kind, {}, {"target_modules": ["embed_tokens"]}, "target_modules") for kind in RULES]
REFUSED += [("ln_tuning", {}, {"target_modules": ["q_proj"]}, "target_modules")]
REFUSED += [
    (kind, {}, {"target_modules": ["input_layernorm"]}, "target_modules")
    for kind in RULES
    if kind != "ln_tuning"
]
REFUSED += [
    ("ia3", {}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("ia3", {}, {"feedforward_modules": None}, "feedforward_modules"),
    ("ia3", {}, {"feedforward_modules": ["up_proj"]}, "feedforward_modules"),
    ("ia3", {}, {"feedforward_modules": "("}, "feedforward_modules"),
    ("ia3", {}, {"layers_to_transform": [0]}, "layers_to_transform"),
    ("loha", {}, {"r": 0}, "r"),
    ("loha", {}, {"r": None}, "r"),
    ("loha", {}, {"alpha": 0}, "alpha"),
    ("loha", {}, {"alpha": 1e9}, "alpha"),
    ("loha", {}, {"use_effective_conv2d": "yes"}, "use_effective_conv2d"),
    ("loha", {}, {"layers_pattern": ["layers"]}, "layers_pattern"),
    ("loha", {}, {"alpha_pattern": {"q_proj": 1, "proj": 2, ".*q_proj": 3}}, "alpha_pattern"),
    ("beft", {}, {"init_weights": "zero"}, "init_weights"),
    ("beft", {}, {"exclude_modules": ["q_proj"]}, "exclude_modules"),
    ("miss", {}, {"r": 65}, "r"),
    ("miss", {}, {"r": 1000}, "r"),
    ("miss", {}, {"r": None}, "r"),
    ("miss", {}, {"init_weights": "bat"}, "init_weights"),
    ("miss", {}, {"init_weights": "other"}, "init_weights"),
    ("miss", {}, {"init_weights": "mini", "mini_r": 48}, "mini_r"),
    ("miss", {}, {"init_weights": "mini", "mini_r": None}, "mini_r"),
    ("miss", {}, {"bias": "all"}, "bias"),
    ("c3a", {}, {"block_size": 24}, "block_size"),
    ("c3a", {}, {"block_size": None}, "block_size"),
    ("c3a", {}, {"block_size_pattern": {"q_proj": 0}}, "block_size_pattern['q_proj']"),
    ("c3a", {}, {"block_size_pattern": {"q_proj": 32}}, f"{Q0}c3a_kernel"),
    ("c3a", {}, {"bias": "all"}, "bias"),
    ("deft", {}, {"decomposition_method": "svd"}, "decomposition_method"),
    ("deft", {}, {"alpha": 1e9}, "alpha"),
    ("deft", {}, {"para": True}, f"{D0}deft_R"),
    ("delora", {}, {"r": 3}, f"{D0}delora_A"),
    ("delora", {}, {"bias": "delora_only"}, "bias"),
    ("fourierft", {}, {"n_frequency": 1 << 20}, "n_frequency"),
    ("fourierft", {}, {"random_loc_seed": None}, "random_loc_seed"),
    ("fourierft", {}, {"random_loc_seed": -1}, "random_loc_seed"),
    ("fourierft", {}, {"scaling": 1e9}, "scaling"),
    ("fourierft", {}, {"n_frequency_pattern": {"(": 1}}, "n_frequency_pattern"),
    ("gralora", {}, {"gralora_k": 3}, "gralora_k"),
    ("gralora", {"rank": 3, "gralora_k": 1}, {"gralora_k": 3}, "gralora_k"),
    ("gralora", {}, {"hybrid_r": -1}, "hybrid_r"),
    ("gralora", {}, {"r": 256}, "r"),
    ("gralora", {}, {"alpha": 0}, "alpha"),
    ("hira", {}, {"r": 5}, f"{D0}hira_A"),
    ("hira", {}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("hra", {}, {"r": 5}, f"{D0}hra_u"),
    ("hra", {}, {"apply_GS": "yes"}, "apply_GS"),
    ("randlora", {}, {"save_projection": False}, "save_projection"),
    ("randlora", {}, {"randlora_alpha": 1e9}, "randlora_alpha"),
    ("randlora", {}, {"r": 5}, f"{D0}randlora_A"),
    ("pvera", {}, {"sample_at_inference": True}, "sample_at_inference"),
    ("pvera", {}, {"save_projection": False}, "base_model.pvera_A"),
    ("tinylora", {}, {"weight_tying": 2}, "weight_tying"),
    ("tinylora", {}, {"weight_tying": 1.0}, "base_model.tinylora_v.1"),
    ("tinylora", {}, {"u": 0}, "u"),
    ("supertuning", {}, {"save_precomputed_indices": False}, "save_precomputed_indices"),
    ("supertuning", {}, {"sparsity": 1}, "sparsity"),
    ("supertuning", {}, {"sparsity": 0.99999}, "sparsity"),
    ("supertuning", {}, {"lora_alpha": 1e9}, "lora_alpha"),
    ("unilora", {}, {"save_indices": True}, "save_indices"),
    ("unilora", {}, {"theta_d_length": 7}, "base_model.unilora_theta_d"),
    ("lokr", {}, {"decompose_factor": 0}, "decompose_factor"),
    ("lokr", {}, {"alpha": 1e9}, "alpha"),
    ("glora", {}, {"config_C": "constant"}, "config_C"),
    ("glora", {}, {"config_A_B": None}, "config_A_B"),
    ("waveft", {}, {"wavelet_family": "sym2"}, "wavelet_family"),
    ("waveft", {}, {"n_frequency": 1 << 20}, "n_frequency"),
    ("waveft", {}, {"random_loc_seed": None}, "random_loc_seed"),
    ("vera", {}, {"r": None}, "r"),
    ("vera", {}, {"r": 1000}, "r"),
    ("vera", {}, {"save_projection": None}, "save_projection"),
    ("vera", {}, {"save_projection": 1}, "save_projection"),
    ("vera", {"save_projection": False}, {"projection_prng_key": None}, "projection_prng_key"),
    ("vera", {"save_projection": False}, {"projection_prng_key": -1}, "projection_prng_key"),
    ("vera", {"save_projection": False}, {"projection_prng_key": 1.5}, "projection_prng_key"),
    # The file holds projections, and the config says that they are drawn anew: which are meant?
    ("vera", {}, {"save_projection": False}, "base_model.vera_A"),
    ("vera", {"save_projection": False}, {"save_projection": True}, "base_model.vera_A"),
    ("vera", {}, {"bias": "all"}, "bias"),
    ("vera", {}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("vblora", {}, {"r": 1000}, "r"),
    ("vblora", {}, {"topk": 0}, "topk"),
    ("vblora", {}, {"topk": 13}, "topk"),
    ("vblora", {}, {"topk": None}, "topk"),
    ("vblora", {}, {"vector_length": 24}, "vector_length"),
    ("vblora", {}, {"vector_length": True}, "vector_length"),
    ("vblora", {}, {"save_only_topk_weights": True}, "save_only_topk_weights"),
    ("vblora", {}, {"bias": "vblora_only"}, "bias"),
    ("adalora", {}, {"init_r": None}, "init_r"),
    ("adalora", {}, {"lora_alpha": 0}, "lora_alpha"),
    ("adalora", {}, {"lora_alpha": -1}, "lora_alpha"),
    ("adalora", {}, {"lora_alpha": 1e9}, "lora_alpha"),
    ("adalora", {}, {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ("adalora", {}, {"bias": "all"}, "bias"),
    ("adalora", {}, {"use_rslora": True}, "use_rslora"),
    ("adalora", {}, {"use_dora": True}, "use_dora"),
    ("adalora", {}, {"lora_bias": True}, "lora_bias"),
    ("adalora", {}, {"init_lora_weights": "pissa"}, "init_lora_weights"),
    ("adalora", {}, {"rank_pattern": {"q_proj": 2}}, "rank_pattern['q_proj']"),
    ("adalora", {}, {"rank_pattern": {"q_proj": [True] * 4}}, "rank_pattern"),
    (
        "adalora",
        {},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}},
        "rank_pattern",
    ),
    (
        "adalora",
        {},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [False] * 4}},
        "rank_pattern",
    ),
]


@pytest.mark.parametrize(("kind", "options", "fields", "where"), REFUSED)
def test_a_field_that_cannot_be_honoured_is_named(
    kind: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    where: str,
    save: Saver,
    spec: BaseSpec,
) -> None:
    saved = saved_by(save, kind, **options)
    assert refusal(saved.with_fields(**fields), saved.weights, spec).where == where


def test_the_rank_limit_is_on_what_is_served(save: Saver, spec: BaseSpec) -> None:
    """A LoHa of rank 17 takes a LoRA of rank 289."""
    saved = saved_by(save, "loha", rank=17)
    with pytest.raises(TooLarge, match=r"r: rank 289 \(17², as LoRA\) .* limit 256"):
        validate(saved.config, saved.weights, spec, Limits())
    saved = saved_by(save, "loha", rank=16)
    assert validate(saved.config, saved.weights, spec, Limits()).rank == 256


def test_the_rank_before_pruning_is_limited_too(save: Saver, spec: BaseSpec) -> None:
    saved = saved_by(save, "adalora")
    with pytest.raises(TooLarge, match="limit 256"):
        validate(saved.with_fields(init_r=1000), saved.weights, spec, Limits())


def test_canonical_configs_hold_plain_paths(save: Saver, spec: BaseSpec) -> None:
    named = saved_by(save, "ia3")
    regex = named.with_fields(
        target_modules=r".*\.(q|down)_proj", feedforward_modules=".*down_proj"
    )
    one = validate(named.config, named.weights, spec, Limits())
    two = validate(regex, named.weights, spec, Limits())
    assert one.config == two.config
    assert one.config["feedforward_modules"] == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]


def test_masks_of_one_rank_mean_the_same(save: Saver, spec: BaseSpec) -> None:
    """Pruning has taken its rows out of the file: which they were no longer matters."""
    name = "model.layers.1.self_attn.q_proj.lora_E"
    saved = saved_by(save, "adalora", rank_pattern={name: [False, True, False, True]})
    one = validate(saved.config, saved.weights, spec, Limits())
    other = saved.with_fields(rank_pattern={name: [True, True, False, False]})
    assert one.config == validate(other, saved.weights, spec, Limits()).config
    assert (one.rank, one.config["rank_pattern"]) == (4, {name: [True, True, False, False]})
