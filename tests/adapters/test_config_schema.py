import dataclasses
import json
from typing import Any

import pytest
from peft import LoraConfig

from adapters.config_schema import (
    RULES,
    check_fingerprint,
    lora_fields,
    other_scales,
    read_config,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from base.spec import BaseSpec

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
}


def refusal(**fields: Any) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        lora_fields(PLAIN | fields, Limits())
    return caught.value


def test_every_field_of_the_installed_peft_has_a_rule() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - set(RULES) == set()


def test_what_peft_writes_by_default_is_accepted() -> None:
    written = LoraConfig(**{k: v for k, v in PLAIN.items() if k != "peft_type"}).to_dict()
    table = read_config(json.dumps(written, default=list).encode())
    fields = lora_fields(table, Limits())
    assert (fields.r, fields.alpha, fields.target_modules) == (8, 16.0, ("q_proj",))


def test_old_configs_may_lack_fields() -> None:
    fields = lora_fields(PLAIN, Limits())
    assert (fields.kind, fields.bias, fields.rank_pattern) == ("lora", "none", {})


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({}, "lora"),
        ({"use_rslora": True}, "rslora"),
        ({"use_dora": True}, "dora"),
        ({"use_dora": True, "use_rslora": True}, "dora"),
    ],
)
def test_kind(flags: dict[str, bool], kind: str) -> None:
    assert lora_fields(PLAIN | flags, Limits()).kind == kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1, -2]),
        ("target_parameters", ["experts.down_proj"]),
        ("use_qalora", True),
        ("monteclora_config", {"num_samples": 4}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"scale": 1.0}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "something_new"),
        ("task_type", "SEQ_CLS"),
        ("bias", "some"),
        ("r", 0),
        ("r", True),
        ("r", 8.0),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_alpha", None),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", ["q_proj", "a|b"]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "(["),
        ("target_modules", "x" * 1025),
        ("exclude_modules", "*"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [""]),
        ("modules_to_save", [".*"]),
        ("layers_to_transform", -1),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", ["(a+)+"]),
        ("layers_pattern", ["layers"]),
        ("use_dora", 1),
        ("use_rslora", "yes"),
        ("lora_bias", "none"),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"[": 1}),
        ("a_field_of_the_future", 0),
        ("a_field_of_the_future", False),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(name: str, value: Any) -> None:
    where = refusal(**{name: value}).where
    assert where == name or (where or "").startswith(f"{name}[")


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_numbers_in_patterns_are_checked(pattern: str) -> None:
    assert refusal(**{pattern: {"q_proj": 0}}).where == f"{pattern}['q_proj']"


def test_combinations_that_peft_refuses_too() -> None:
    assert refusal(lora_bias=True, use_dora=True).where == "lora_bias"
    together = {"target_modules": ".*q_proj", "layers_to_transform": [0]}
    assert refusal(**together).where == "layers_to_transform"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_dropout", 0.5),
        ("auto_mapping", {"base_model_class": "os.system", "parent_library": "os"}),
        ("base_model_name_or_path", "/etc/passwd"),
        ("inference_mode", False),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"cache_file": "/tmp/x.pt", "covariance_file": "/tmp/y.pt"}),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", False),
        ("a_field_of_the_future", None),
        ("layer_replication", []),
    ],
)
def test_what_cannot_change_the_maths_is_accepted(name: str, value: Any) -> None:
    assert lora_fields(PLAIN | {name: value}, Limits()) == lora_fields(PLAIN, Limits())


def test_mark_of_the_base(spec: BaseSpec) -> None:
    mine, other = spec.fingerprint, "b" * 64
    check_fingerprint({}, {}, spec)
    check_fingerprint(
        {"nibble": {"base_fingerprint": mine}}, {"base_fingerprint": mine, "format": "pt"}, spec
    )
    for config, metadata in (
        ({"nibble": {"base_fingerprint": other}}, {}),
        ({}, {"base_fingerprint": other}),
    ):
        with pytest.raises(InvalidAdapter, match=rf"made for the base b+, this one is {mine}"):
            check_fingerprint(config, metadata, spec)
    for bad in ("x", {"base_fingerprint": "A" * 64}, {"base_fingerprint": mine, "more": 1}, {}):
        with pytest.raises(InvalidAdapter):
            check_fingerprint({"nibble": bad}, {}, spec)
    with pytest.raises(InvalidAdapter, match=r"metadata.base_fingerprint: must be 64"):
        check_fingerprint({}, {"base_fingerprint": "mine"}, spec)


def test_the_same_base_with_other_scales_is_refused_with_the_option(spec: BaseSpec) -> None:
    made = {"base_fingerprint": spec.twin}
    with pytest.raises(
        InvalidAdapter,
        match=r"without double quantisation, and it is loaded with it: .*--no-double-quant`"
        r" \(double_quant=false\)",
    ):
        check_fingerprint({}, made, spec)
    plain = dataclasses.replace(
        spec, fingerprint=spec.twin, twin=spec.fingerprint, double_quant=False
    )
    check_fingerprint({}, made, plain)
    with pytest.raises(
        InvalidAdapter,
        match=r"with double quantisation, and it is loaded without it: .*`--double-quant`",
    ):
        check_fingerprint({}, {"base_fingerprint": spec.fingerprint}, plain)


def test_stored_ones_are_counted_with_the_option() -> None:
    assert other_scales("m", True, 1).startswith("1 stored adapter was made for m without double")
    assert other_scales("m", False, 3).startswith("3 stored adapters were made for m with double")
    assert "`--double-quant`" in other_scales("m", False, 3)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b'{"r":8,"r":9}', b'{"r":NaN}', b"{" * 9000])
def test_json_is_strict(raw: bytes) -> None:
    with pytest.raises(InvalidAdapter):
        read_config(raw)
