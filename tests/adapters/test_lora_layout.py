"""Our reading of a config against PEFT's own, module by module."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from adapters.config_schema import lora_fields
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.lora_layout import LoraLayout, canonical_config, match_lora
from adapters.promises import PREFIX
from adapters.safetensors_header import TensorEntry, open_regular, read_header
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver, TinyBase

# Every way to name ranks, targets and saved modules that we serve.
VARIANTS: dict[str, dict[str, Any]] = {
    "one": {"targets": ["q_proj"]},
    "two": {"targets": ["q_proj", "down_proj"], "rank": 3},
    "all_linear": {"targets": "all-linear"},
    "regex": {"targets": r".*\.(q|v)_proj"},
    "regex_of_one_layer": {"targets": r"model\.layers\.1\.mlp\..*_proj"},
    "full_paths": {"targets": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "patterns": {
        "targets": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.[kv]_proj": 7, "down_proj": 5},
        "alpha_pattern": {"model.layers.0.self_attn.k_proj": 3, "^model.*v_proj": 9.5},
    },
    "rank_pattern_of_part_of_a_name": {"targets": ["q_proj"], "rank_pattern": {"proj": 2}},
    "one_layer": {"targets": ["q_proj", "o_proj"], "layers_to_transform": 1},
    "layers_by_pattern": {
        "targets": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "layers_and_a_full_path": {
        "targets": ["model.layers.1.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "excluded": {"targets": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "excluded_by_regex": {"targets": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    "head": {"targets": ["q_proj", "lm_head"]},
    "embeddings": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "lora_bias": {"targets": ["q_proj", "gate_proj"], "lora_bias": True},
    "bias_all": {"targets": ["q_proj"], "bias": "all"},
    "bias_lora_only": {"targets": ["q_proj", "gate_proj"], "bias": "lora_only"},
    "saved_head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_many": {"targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "saved_block": {"targets": ["q_proj", "up_proj"], "modules_to_save": ["layers.0.mlp"]},
    "saved_with_bias": {"targets": ["q_proj"], "modules_to_save": ["k_proj"]},
    "gaussian": {"targets": ["q_proj"], "init_lora_weights": "gaussian"},
    "mica": {"targets": ["q_proj"], "init_lora_weights": "mica"},
    "orthogonal": {"targets": ["q_proj"], "init_lora_weights": "orthogonal"},
}
WITHOUT_DORA = {"lora_bias", "mica"}
CASES = [
    (kind, name)
    for kind in ("lora", "rslora", "dora")
    for name in VARIANTS
    if not (kind == "dora" and name in WITHOUT_DORA)
]


def read(saved: Saved) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    with open_regular(saved.weights) as fd:
        return json.loads(saved.config), dict(read_header(fd, Limits()).tensors)


def layout_of(saved: Saved, spec: BaseSpec, **fields: Any) -> LoraLayout:
    config, tensors = read(saved)
    return match_lora(lora_fields(config | fields, Limits()), tensors, spec, Limits())


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_we_read_a_config_as_peft_does(
    kind: str, name: str, save: Saver, bases: Callable[..., TinyBase]
) -> None:
    """Targets, ranks and scales are those of the model that PEFT builds from the same file."""
    saved = save(kind, **VARIANTS[name])
    layout = layout_of(saved, bases().spec)
    scales, modules_to_save = peft_scales(bases().directory, saved)
    use_rslora = kind == "rslora"
    ours = {
        path: layout.alphas[path] / (math.sqrt(rank) if use_rslora else rank)
        for path, rank in layout.ranks.items()
    }
    assert ours == pytest.approx(scales)
    assert set(layout.saved) == modules_to_save
    assert set(layout.tensors) == set(read(saved)[1])


def peft_scales(directory: Any, saved: Saved) -> tuple[dict[str, float], set[str]]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(directory)
        model = PeftModel.from_pretrained(model, str(saved.directory))
    scales, whole = {}, set()
    for name, module in model.named_modules():
        path = name.removeprefix(PREFIX)
        if isinstance(module, LoraLayer):
            scales[path] = float(module.scaling["default"])
        if isinstance(module, ModulesToSaveWrapper):
            saved_part = module.modules_to_save["default"]
            inner = [
                n for n, m in saved_part.named_modules() if dict(m.named_parameters(recurse=False))
            ]
            whole |= {f"{path}.{n}" if n else path for n in inner}
    return scales, whole


@pytest.mark.parametrize("name", ["patterns", "regex", "saved_many", "one_layer", "bias_all"])
def test_the_canonical_config_means_the_same(name: str, save: Saver, spec: BaseSpec) -> None:
    """Read again, it gives the same layout; and it has no pattern left in it."""
    config, tensors = read(save("lora", **VARIANTS[name]))
    fields = lora_fields(config, Limits())
    layout = match_lora(fields, tensors, spec, Limits())
    canonical = canonical_config(fields, layout)
    again = lora_fields(canonical, Limits())
    assert match_lora(again, tensors, spec, Limits()) == layout
    assert canonical_config(again, layout) == canonical
    known = {*spec.linears, *spec.embeddings, *spec.norms}
    for paths in ("target_modules", "rank_pattern", "alpha_pattern"):
        assert set(canonical[paths]) <= known
    assert set(canonical["modules_to_save"] or ()) <= known


def test_the_same_meaning_has_one_canonical_config(save: Saver, spec: BaseSpec) -> None:
    def canonical(**fields: Any) -> dict[str, Any]:
        config, tensors = read(save("lora", targets=["q_proj", "v_proj"]))
        checked = lora_fields(config | fields, Limits())
        return canonical_config(checked, match_lora(checked, tensors, spec, Limits()))

    plain = canonical()
    assert canonical(target_modules=r".*[qv]_proj", lora_dropout=0.3, peft_version="0.9") == plain
    assert canonical(target_modules=["v_proj", "q_proj"]) == plain
    assert canonical(r=9, rank_pattern={"proj": 4, "[qv]_proj": 4})["r"] == 9
    assert canonical(lora_alpha=1) != plain


def test_an_alpha_that_depends_on_the_order_of_keys_is_refused(save: Saver, spec: BaseSpec) -> None:
    """PEFT saves {"q_proj": 1, "layers.1.*": 2} sorted, and reads it back as another adapter."""
    saved = save(targets=["q_proj"])
    error = refusal(saved, spec, alpha_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 1})
    assert error.where == "alpha_pattern"
    layout_of(saved, spec, alpha_pattern={"layers.1.self_attn.q_proj": 1, "q_proj": 1})


def test_tied_embeddings_that_train_together(save: Saver, bases: Callable[..., TinyBase]) -> None:
    tied = bases(True).spec
    saved = save("lora", tied=True, targets=["embed_tokens"], ensure_weight_tying=True)
    assert set(layout_of(saved, tied).ranks) == {"model.embed_tokens", "lm_head"}
    whole = save(
        "lora",
        tied=True,
        targets=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    assert set(layout_of(whole, tied).saved) == {"model.embed_tokens", "lm_head"}


def refusal(saved: Saved, spec: BaseSpec, **fields: Any) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        layout_of(saved, spec, **fields)
    return caught.value


def test_a_target_without_tensors_is_named(save: Saver, spec: BaseSpec) -> None:
    """PEFT would leave such a module at its random beginning, in silence."""
    error = refusal(save(targets=["q_proj"]), spec, target_modules=["q_proj", "v_proj"])
    assert error.where == f"{PREFIX}model.layers.0.self_attn.v_proj.lora_A.weight"
    assert "missing" in error.reason
    assert "4 tensors" in error.reason


def test_tensors_that_the_config_does_not_target_are_named(save: Saver, spec: BaseSpec) -> None:
    error = refusal(save(targets=["q_proj", "v_proj"]), spec, target_modules=["q_proj"])
    assert error.where == f"{PREFIX}model.layers.0.self_attn.v_proj.lora_A.weight"
    assert "does not touch" in error.reason


def test_ranks_must_be_those_of_the_config(save: Saver, spec: BaseSpec) -> None:
    error = refusal(save(targets=["q_proj"], rank=4), spec, r=8)
    assert "shape [4, 64], expected [8, 64] for rank 8" in error.reason
    pattern = {"layers.1.self_attn.q_proj": 2}
    error = refusal(save(targets=["q_proj"], rank=4), spec, rank_pattern=pattern)
    assert "layers.1.self_attn.q_proj" in str(error.where)
    assert "expected [2, 64]" in error.reason


def test_rank_and_scale_have_limits(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    error = refusal(saved, spec, r=257)
    assert isinstance(error, TooLarge)
    assert "rank 257" in error.reason
    assert refusal(saved, spec, lora_alpha=1e6).where == "lora_alpha"
    assert refusal(saved, spec, lora_alpha=-1e6).where == "lora_alpha"
    layout_of(saved, spec, lora_alpha=3e4)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"target_modules": ["c_attn"]}, "target_modules"),
        ({"target_modules": ["q_proj", "norm"]}, "target_modules"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
        ({"modules_to_save": ["proj"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias"),
    ],
)
def test_modules_that_cannot_be(
    save: Saver, spec: BaseSpec, fields: dict[str, Any], where: str
) -> None:
    assert refusal(save(targets=["q_proj"]), spec, **fields).where == where


def test_flags_promise_tensors(save: Saver, spec: BaseSpec) -> None:
    lora, dora = save(targets=["q_proj"]), save("dora", targets=["q_proj"])
    assert "lora_magnitude_vector" in str(refusal(lora, spec, use_dora=True).where)
    assert "lora_magnitude_vector" in str(refusal(dora, spec, use_dora=False).where)
    assert "lora_B.bias" in str(refusal(lora, spec, lora_bias=True).where)
    assert "base_layer.bias" in str(refusal(lora, spec, bias="lora_only").where)
    assert "lm_head.weight" in str(refusal(lora, spec, modules_to_save=["lm_head"]).where)


def test_an_adapter_of_another_shape_of_base(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    wide = {
        path: replace(shape, in_features=2 * shape.in_features)
        for path, shape in spec.linears.items()
    }
    error = refusal(saved, replace(spec, linears=wide))
    assert "shape [4, 64], expected [4, 128]" in error.reason
    deeper = {path.replace("layers.1.", "layers.7."): s for path, s in spec.linears.items()}
    error = refusal(saved, replace(spec, linears=deeper))
    assert "no such module" in error.reason


def test_both_spellings_of_the_magnitude(save: Saver, spec: BaseSpec) -> None:
    config, tensors = read(save("dora", targets=["q_proj"]))
    fields = lora_fields(config, Limits())
    longer = {
        (f"{n}.weight" if n.endswith("magnitude_vector") else n): e for n, e in tensors.items()
    }
    assert set(match_lora(fields, longer, spec, Limits()).tensors) == set(longer)
    with pytest.raises(InvalidAdapter, match="given twice"):
        match_lora(fields, longer | tensors, spec, Limits())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q_proj.lora_A.weight", "names begin with"),
        (PREFIX + "model.layers.0.self_attn.q_proj.lora_A.default.weight", "expected only"),
        (PREFIX + "model.layers.0.self_attn.q_proj.lora_C.weight", "expected only lora_A.weight"),
        (PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight", "no such module"),
        (PREFIX + "model.layers.0.mlp.up_proj.weight", "does not touch"),
    ],
)
def test_a_left_over_tensor_is_named(save: Saver, spec: BaseSpec, name: str, words: str) -> None:
    config, tensors = read(save(targets=["q_proj"]))
    extra = TensorEntry(name, "F32", (1,), 0, 4)
    with pytest.raises(InvalidAdapter) as caught:
        match_lora(lora_fields(config, Limits()), tensors | {name: extra}, spec, Limits())
    assert caught.value.where == name
    assert words in caught.value.reason
