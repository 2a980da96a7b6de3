"""Virtual tokens, lowered to their keys and values.

prompt tuning, P-tuning, CPT    embeddings P [n, hidden], run through the base
multitask prompt tuning         P ⊙ (C R), with C [n, r] and R [r, hidden] of the task, run alike
prefix tuning, cartridges       the keys and values themselves, as PEFT hands them to its cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapters.delta import Delta, Prefix
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .virtual_run import run_virtual_tokens

_TENSOR = "prompt_embeddings"

# From the canonical config, the file, the base, and the deltas of modules_to_save.
PrefixFamily = Callable[[Mapping[str, Any], AdapterCheckpoint, Base, Mapping[str, Delta]], Prefix]


def lower_prompt(
    config: Mapping[str, Any],
    checkpoint: AdapterCheckpoint,
    base: Base,
    deltas: Mapping[str, Delta],
) -> Prefix:
    """Rows of embeddings. Raises InvalidAdapter."""
    shape = (config["num_virtual_tokens"], base.spec.hidden_size)
    return run_virtual_tokens(checkpoint.take_bare(_TENSOR, *shape), base, deltas)


def lower_multitask(
    config: Mapping[str, Any],
    checkpoint: AdapterCheckpoint,
    base: Base,
    deltas: Mapping[str, Delta],
) -> Prefix:
    """Rows of embeddings, scaled by the task's low-rank product. Raises InvalidAdapter."""
    n, r, hidden = config["num_virtual_tokens"], config["num_ranks"], base.spec.hidden_size
    columns = checkpoint.take_bare("prefix_task_cols", 1, n, r)[0]
    rows = checkpoint.take_bare("prefix_task_rows", 1, r, hidden)[0]
    embeddings = checkpoint.take_bare(_TENSOR, n, hidden) * (columns @ rows)
    return run_virtual_tokens(embeddings, base, deltas)


def lower_keys_and_values(
    config: Mapping[str, Any],
    checkpoint: AdapterCheckpoint,
    base: Base,
    deltas: Mapping[str, Delta],
) -> Prefix:
    """One row for each virtual token: layer by layer its keys, then its values. PEFT puts them
    into the cache as they are, without a rotation. Raises InvalidAdapter."""
    del deltas  # nothing of the base comes before a layer's cache
    spec, n = base.spec, config["num_virtual_tokens"]
    parts = (spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    flat = checkpoint.take_bare(_TENSOR, n, parts[0] * parts[1] * parts[2] * parts[3])
    kept = flat.to(base.dtype).view(n, *parts).permute(2, 1, 0, 3, 4).contiguous()
    return Prefix(kept[0], kept[1])


PREFIXES: Mapping[str, PrefixFamily] = {
    "prompt_tuning": lower_prompt,
    "multitask_prompt_tuning": lower_multitask,
    "p_tuning": lower_prompt,
    "cpt": lower_prompt,
    "prefix_tuning": lower_keys_and_values,
    "cartridge": lower_keys_and_values,
}
