"""A trained adapter, from PEFT's two files back onto the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.checks.bottleneck import is_adapter_hub
from adapters.config_schema import other_base
from base.load import Base
from training.config import MethodConfig
from training.errors import MethodError
from training.methods import Attached
from training.methods.bottleneck import BottleneckAdapter, variant_of
from training.methods.files import CONFIG, WEIGHTS, fill
from training.methods.low_rank import KINDS, LowRankAdapter

Tensors = dict[str, Tensor]


def load(source: Path, base: Base) -> Attached:
    """Attach the adapter of the directory `source` to the base.

    LoRA, rsLoRA and DoRA come onto our own layers, any other kind onto PEFT's.
    Raises MethodError when its tensors do not fit the base, or it was trained over another.
    """
    fields = _fields(source)
    tensors = _tensors(source, base)
    if is_adapter_hub(fields):
        return _load_bottleneck(source, fields, tensors, base)
    config = low_rank_config(fields)
    if config is None:
        return _load_peft(source, fields, tensors, base)
    return _load_own(source, config, tensors, base)


def low_rank_config(fields: dict[str, Any]) -> MethodConfig | None:
    """The method behind a PEFT config, where it is one of ours and no more than that."""
    if fields.get("peft_type") != "LORA" or _beyond(fields):
        return None
    flags = {name: kind.peft_fields for name, kind in KINDS.items()}
    used = {field: fields.get(field, False) for row in flags.values() for field in row}
    for name, row in flags.items():
        if used == {**dict.fromkeys(used, False), **row}:
            return MethodConfig(
                kind=name,  # type: ignore[arg-type]
                rank=fields["r"],
                alpha=fields["lora_alpha"],
                dropout=fields["lora_dropout"],
                targets=tuple(fields["target_modules"]),
            )
    return None


def _beyond(fields: dict[str, Any]) -> bool:
    """Does the config say something that our layers do not do?"""
    extras = (
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "lora_bias",
        "layers_to_transform",
    )
    return fields.get("bias", "none") != "none" or any(fields.get(name) for name in extras)


def _load_own(source: Path, config: MethodConfig, tensors: Tensors, base: Base) -> Attached:
    adapter = LowRankAdapter(base, config)
    unlike = adapter.fill(tensors)
    if unlike is not None:
        adapter.detach()
        raise MethodError(f"{source / WEIGHTS}: {unlike} does not fit {base.spec.id}")
    return adapter


def _load_bottleneck(
    source: Path, fields: dict[str, Any], tensors: Tensors, base: Base
) -> Attached:
    config = variant_of(fields)
    if config is None:
        raise MethodError(
            f"{source / CONFIG}: of AdapterHub's adapters, the bottlenecks that are trained here "
            "are attached: Houlsby's and Pfeiffer's"
        )
    adapter = BottleneckAdapter(base, config)
    unlike = fill(adapter.tensors(), tensors)
    if unlike is not None:
        adapter.detach()
        raise MethodError(f"{source / WEIGHTS}: {unlike} does not fit {base.spec.id}")
    return adapter


def _load_peft(source: Path, fields: dict[str, Any], tensors: Tensors, base: Base) -> Attached:
    import peft  # takes seconds, and our own layers do without
    from peft.utils import set_peft_model_state_dict

    from training.methods.peft_methods import PeftAdapter

    try:
        config = peft.PeftConfig.from_peft_type(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise MethodError(f"{source / CONFIG}: {error}") from None
    config.inference_mode = True
    adapter = PeftAdapter(base, config)
    try:
        outcome = set_peft_model_state_dict(adapter.model, tensors)
    except (KeyError, RuntimeError) as error:
        adapter.detach()
        raise MethodError(f"{source / WEIGHTS} does not fit {base.spec.id}: {error}") from None
    # PEFT puts virtual tokens where they belong, and then calls their tensor unexpected.
    known = {"prompt_embeddings"} if adapter.virtual_tokens else set()
    left_over = [name for name in outcome.unexpected_keys if name not in known]
    if left_over:
        adapter.detach()
        raise MethodError(f"{source / WEIGHTS}: {left_over[0]} does not fit {base.spec.id}")
    return adapter


def _fields(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise MethodError(f"{path} holds a {type(fields).__name__}; an object is needed")
    return fields


def _tensors(source: Path, base: Base) -> Tensors:
    """Raises MethodError for a file that `nibble train` wrote over another base too."""
    path = source / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("base_fingerprint")
            if made_for is not None and (why := other_base(made_for, base.spec)) is not None:
                raise MethodError(f"{path}: {why}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MethodError(f"{path}: {error}") from None
