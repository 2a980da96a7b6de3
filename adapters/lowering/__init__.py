"""Lowering: from a PEFT checkpoint to what the operator reads.

One file per family, one row per kind in `FAMILIES`. A family turns tensors into deltas; what holds
for all of them (every tensor is consumed, merged placement) happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapters.config_schema import other_base
from adapters.delta import Bottleneck, Delta, LinearDelta, LoweredAdapter, Resized
from adapters.errors import InvalidAdapter
from adapters.manifest import AdapterManifest, MergedDtype, Placement
from base.load import Base

from .adalora import lower_adalora
from .beft import lower_beft
from .boft import lower_boft
from .bottleneck import lower_bottleneck
from .c3a import lower_c3a
from .checkpoint import UNWRAPPED, WRAPPED, AdapterCheckpoint
from .deft import lower_deft
from .delora import lower_delora
from .factors import rounded
from .fourierft import lower_fourierft
from .glora import lower_glora
from .gralora import lower_gralora
from .hira import lower_hira
from .hra import lower_hra
from .ia3 import lower_ia3
from .ln_tuning import lower_ln_tuning
from .loha import lower_loha
from .lokr import lower_lokr
from .lora import lower_lora
from .merged import keep_dense, merge
from .miss import lower_miss
from .oft import lower_oft
from .peanut import lower_peanut
from .poly import lower_poly
from .prefix import PREFIXES
from .pvera import lower_pvera
from .randlora import lower_randlora
from .road import lower_road
from .shira import lower_shira
from .supertuning import lower_supertuning
from .tinylora import lower_tinylora
from .token_rows import lower_trainable_tokens
from .unilora import lower_unilora
from .vblora import lower_vblora
from .vera import lower_vera
from .vocabulary import divided, leave_doubles, resized_base
from .waveft import lower_waveft
from .whole import lower_saved

__all__ = ["FAMILIES", "lower"]

# By module path: a Delta each, or a Dense, which is still to be computed.
Family = Callable[[Mapping[str, Any], AdapterCheckpoint, Base], dict[str, Any]]

FAMILIES: Mapping[str, Family] = {
    "lora": lower_lora,
    "alora": lower_lora,
    "rslora": lower_lora,
    "dora": lower_lora,
    "adalora": lower_adalora,
    "beft": lower_beft,
    "boft": lower_boft,
    "bottleneck": lower_bottleneck,
    "c3a": lower_c3a,
    "deft": lower_deft,
    "delora": lower_delora,
    "fourierft": lower_fourierft,
    "glora": lower_glora,
    "gralora": lower_gralora,
    "hira": lower_hira,
    "hra": lower_hra,
    "ia3": lower_ia3,
    "ln_tuning": lower_ln_tuning,
    "loha": lower_loha,
    "lokr": lower_lokr,
    "miss": lower_miss,
    "oft": lower_oft,
    "peanut": lower_peanut,
    "poly": lower_poly,
    "pvera": lower_pvera,
    "randlora": lower_randlora,
    "road": lower_road,
    "shira": lower_shira,
    "supertuning": lower_supertuning,
    "tinylora": lower_tinylora,
    "trainable_tokens": lower_trainable_tokens,
    "unilora": lower_unilora,
    "vblora": lower_vblora,
    "vera": lower_vera,
    "waveft": lower_waveft,
    **dict.fromkeys(PREFIXES, lower_saved),  # beside their virtual tokens
}


def lower(
    manifest: AdapterManifest,
    weights: Path,
    base: Base,
    *,
    placement: Placement | None = None,
    merged_dtype: MergedDtype | None = None,
) -> LoweredAdapter:
    """The adapter in the file `weights`, ready for the operator: on base.device, in base.dtype.

    `placement` and `merged_dtype` default to the manifest's. Vectors stay in float32. A merged
    adapter's notes say what rounding its weights cost: `requantisation_error` is
    ‖W_kept - W_merged‖ / ‖W_merged‖ of the worst layer, `requantisation_error_mean` the mean.

    Raises InvalidAdapter, naming the tensor or field, where the file is for another base, a
    tensor is left over, or something in it cannot be applied exactly.
    """
    family = FAMILIES.get(manifest.kind)
    if family is None:
        raise InvalidAdapter(f"kind {manifest.kind!r} cannot be served", "kind")
    if (why := other_base(manifest.base_fingerprint, base.spec)) is not None:
        raise InvalidAdapter(why, "base_fingerprint")
    placement = placement or manifest.placement
    virtual = PREFIXES.get(manifest.kind)
    if virtual and placement == "merged":
        raise InvalidAdapter("a prefix has nothing to merge; expected 'unmerged'", "placement")
    if manifest.invocation and placement == "merged":
        reason = "an activated LoRA holds for a part of a sequence; expected 'unmerged'"
        raise InvalidAdapter(reason, "placement")
    root = UNWRAPPED if virtual else WRAPPED
    with AdapterCheckpoint(weights, base.device, root) as checkpoint:
        own = resized_base(base, manifest.vocabulary, checkpoint) if manifest.vocabulary else base
        leave_doubles(checkpoint, base)
        deltas = family(manifest.config, checkpoint, own)
        prefix = virtual(manifest.config, checkpoint, base, deltas) if virtual else None
        checkpoint.finish()
    assert set(deltas) == set(manifest.targets), "lowering and validation disagree on the targets"
    notes: Mapping[str, float] = {}
    if placement == "merged":
        deltas, notes = merge(deltas, own, merged_dtype or manifest.merged_dtype)
    else:
        deltas = keep_dense(deltas, own)
    if manifest.vocabulary:
        deltas = divided(deltas, base, own)
    return LoweredAdapter(
        digest=manifest.digest,
        kind=manifest.kind,
        placement=placement,
        deltas=rounded(deltas, base),
        rank=max((_rank(delta) for delta in deltas.values()), default=0),
        notes=notes,
        prefix=prefix,
        vocabulary=manifest.vocabulary,
    )


def _rank(delta: Delta) -> int:
    if isinstance(delta, Resized):
        return 0 if delta.inner is None else _rank(delta.inner)
    if isinstance(delta, Bottleneck):
        return delta.rank
    terms = delta.low_rank if isinstance(delta, LinearDelta) else ()
    return sum(term.rank for term in terms)
