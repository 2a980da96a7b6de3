"""LoHa: the elementwise product of two low-rank matrices, which has rank r² at most.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    LAYERS,
    Rule,
    alpha,
    apply_rules,
    flag,
    ignore,
    pattern,
    present,
    rank,
    target_fields,
    targets,
)
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
from adapters.ranks import alpha_of, check_rank, check_scale
from adapters.safetensors_header import Header
from adapters.targets import matching
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "alpha": alpha,
    "rank_pattern": pattern(rank),
    "alpha_pattern": pattern(alpha),
    "exclude_modules": targets,
    "rank_dropout": ignore,  # off at inference
    "module_dropout": ignore,
    "use_effective_conv2d": flag,  # of convolutions, and only linears are targets
    "init_weights": flag,  # the file holds them
}


def check_loha(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge (for r² over the rank limit), naming what is wrong."""
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "LoHa")
    r, a = int(present(config, "r")), float(present(config, "alpha"))
    ranks = {path: (matching(config.get("rank_pattern") or {}, path) or [r])[0] for path in paths}
    alphas = {path: alpha_of(config.get("alpha_pattern") or {}, a, path) for path in paths}
    promised = whole_modules(spec, saved)
    factors = 0
    for path in paths:
        own, linear = ranks[path], spec.linears[path]
        check_rank(path, own * own, limits, f" ({own}², as LoRA)")
        of = f"alpha {alphas[path]:g}, rank {own}"
        check_scale(path, alphas[path] / own, of, "alpha", limits)
        for n in (1, 2):
            start, why = f"{PREFIX}{path}.hada_w{n}_", f" for rank {own}"
            promised[f"{start}a"] = Expected(path, (linear.out_features, own), "factor", why)
            promised[f"{start}b"] = Expected(path, (own, linear.in_features), "factor", why)
        factors += own * own * (linear.in_features + linear.out_features)
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="loha",
            rank=max(own * own for own in ranks.values()),
            targets=touched(paths, saved),
            config={
                "peft_type": "LOHA",
                "r": r,
                "alpha": a,
                "target_modules": paths,
                "rank_pattern": {path: own for path, own in ranks.items() if own != r},
                "alpha_pattern": {path: own for path, own in alphas.items() if own != a},
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (factors + numbers(found, "saved")),
        )
    )
