"""Whether an upload can be served as it is: applied or refused, nothing between. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.checked import Checked, Checker, Validated, numbers
from adapters.checks.adalora import check_adalora
from adapters.checks.beft import check_beft
from adapters.checks.boft import check_boft
from adapters.checks.bottleneck import check_bottleneck, is_adapter_hub
from adapters.checks.c3a import check_c3a
from adapters.checks.deft import check_deft
from adapters.checks.delora import check_delora
from adapters.checks.fourierft import check_fourierft
from adapters.checks.glora import check_glora
from adapters.checks.gralora import check_gralora
from adapters.checks.hira import check_hira
from adapters.checks.hra import check_hra
from adapters.checks.ia3 import check_ia3
from adapters.checks.ln_tuning import check_ln_tuning
from adapters.checks.loha import check_loha
from adapters.checks.lokr import check_lokr
from adapters.checks.miss import check_miss
from adapters.checks.oft import check_oft
from adapters.checks.peanut import check_peanut
from adapters.checks.poly import check_poly
from adapters.checks.prefix import CHECKERS_OF_PREFIXES
from adapters.checks.pvera import check_pvera
from adapters.checks.randlora import check_randlora
from adapters.checks.road import check_road
from adapters.checks.saved_tables import doubles, own_rows, vocabulary_of, with_saved_tables
from adapters.checks.shira import check_shira
from adapters.checks.supertuning import check_supertuning
from adapters.checks.tinylora import check_tinylora
from adapters.checks.tokenizer import check_tokenizer
from adapters.checks.trainable_tokens import check_trainable_tokens
from adapters.checks.unilora import check_unilora
from adapters.checks.vblora import check_vblora
from adapters.checks.vera import check_vera
from adapters.checks.waveft import check_waveft
from adapters.config_schema import check_fingerprint, lora_fields, read_config
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.lora_layout import canonical_config, match_lora
from adapters.methods import REFUSED_METHODS
from adapters.safetensors_header import Header, open_regular, read_header
from adapters.tensor_values import check_indices, check_values
from adapters.vocabulary import Tokens, resized, table_shapes
from base.spec import BaseSpec

__all__ = ["CHECKERS", "Validated", "checker", "validate"]


def validate(
    config: bytes,
    weights: Path,
    spec: BaseSpec,
    limits: Limits,
    tokens: Tokens | None = None,
) -> Validated:
    """Check an upload against the base: header, config, every tensor's shape, every number, and
    the tokenizer if it brings one.

    `config` is adapter_config.json, `weights` an adapter_model.safetensors. Patterns in the config
    are run as regular expressions: for a stranger's upload use `validate_in_child`.

    Raises InvalidAdapter, UnsupportedMedia or TooLarge, naming the tensor or the field.
    """
    if len(config) > limits.max_config_bytes:
        raise TooLarge(f"{len(config)} bytes, limit {limits.max_config_bytes}", "config")
    table = read_config(config)
    check = checker("BOTTLENECK" if is_adapter_hub(table) else table.get("peft_type"))
    with open_regular(weights) as fd:
        header = read_header(fd, limits)
        check_fingerprint(table, header.metadata, spec)
        rows = vocabulary_of(header, spec, limits)
        own = resized(spec, rows)
        twice = doubles(header, own)
        once = replace(header, tensors={n: e for n, e in header.tensors.items() if n not in twice})
        checked = check(with_saved_tables(table, header, own, fd), once, own, limits)
        for name, entry in header.tensors.items():
            if name in checked.indices:
                check_indices(fd, entry, checked.indices[name])
                continue
            check_values(fd, entry, limits.max_value, positive=name in checked.positive)
    base_rows = own_rows(spec)
    own_tokenizer = check_tokenizer(tokens, rows, base_rows, limits)
    if rows == base_rows:
        return replace(checked.validated, own_tokenizer=own_tokenizer)
    more = sum(4 * max(rows - base_rows, 0) * width for _, width in table_shapes(spec).values())
    return replace(
        checked.validated,
        vocabulary=rows,
        own_tokenizer=own_tokenizer,
        memory_bytes=checked.validated.memory_bytes + more,
    )


def checker(peft_type: object) -> Checker:
    """The checks of one PEFT method. Raises InvalidAdapter for a method that is not served."""
    if not isinstance(peft_type, str) or peft_type not in CHECKERS:
        found = "is missing" if peft_type is None else f"{str(peft_type)[:40]!r} is not served"
        why = REFUSED_METHODS.get(peft_type) if isinstance(peft_type, str) else None
        found += f": {why}" if why else ""
        raise InvalidAdapter(f"{found}; expected one of {', '.join(CHECKERS)}", "peft_type")
    return CHECKERS[peft_type]


def _check_lora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    fields = lora_fields(config, limits)
    layout = match_lora(fields, header.tensors, spec, limits)
    parameters = numbers(layout.tensors)
    validated = Validated(
        kind=fields.kind,
        rank=max(layout.ranks.values()),
        targets=layout.modules,
        config=canonical_config(fields, layout),
        parameters=parameters,
        memory_bytes=layout.memory_bytes(spec),
    )
    magnitudes = (name for name, e in layout.tensors.items() if e.role == "magnitude")
    return Checked(validated, frozenset(magnitudes))


# One row per method that adapters/methods.py serves; why it refuses the others is there too.
CHECKERS: Mapping[str, Checker] = {
    "LORA": _check_lora,
    "ADALORA": check_adalora,
    "BEFT": check_beft,
    "BOFT": check_boft,
    "BOTTLENECK": check_bottleneck,
    "C3A": check_c3a,
    "DEFT": check_deft,
    "DELORA": check_delora,
    "FOURIERFT": check_fourierft,
    "GLORA": check_glora,
    "GRALORA": check_gralora,
    "HIRA": check_hira,
    "HRA": check_hra,
    "IA3": check_ia3,
    "LN_TUNING": check_ln_tuning,
    "LOHA": check_loha,
    "LOKR": check_lokr,
    "MISS": check_miss,
    "OFT": check_oft,
    "PEANUT": check_peanut,
    "POLY": check_poly,
    "PVERA": check_pvera,
    "RANDLORA": check_randlora,
    "ROAD": check_road,
    "SHIRA": check_shira,
    "SUPERTUNING": check_supertuning,
    "TINYLORA": check_tinylora,
    "TRAINABLE_TOKENS": check_trainable_tokens,
    "UNILORA": check_unilora,
    "VBLORA": check_vblora,
    "VERA": check_vera,
    "WAVEFT": check_waveft,
    **CHECKERS_OF_PREFIXES,
}
