"""One row per method of PEFT: what it lowers to and what that costs, or why it is refused.

The reason ends up in the reply to an upload, so it says what stands in the way, for its author.
A row that is served has a checker in adapters/validate.py; those that are no PEFT method may join.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Form = Literal[
    "low-rank",  # terms B (d ⊙ (A x))
    "scales",  # g on the output, p on the input
    "bias",
    "norm",  # the adapter's own norms
    "prefix KV",  # run once when it is loaded, its keys and values kept
    "embedding rows",
    "operator",  # a computation of its own for each token
    "private weights",  # the adapter's own matrix, computed when it is lowered
]


@dataclass(frozen=True, slots=True)
class Method:
    """How one method is served, and what one target of shape [m, n] (out, in) costs.

    The costs are Python expressions in m, n and the numbers of the canonical config (r, ...), so
    that a test can compare them with what is really held. A multiply-add is two flops.
    """

    form: Form | None = None  # None: refused
    memory: str = "0"  # bytes once lowered, in float32
    flops: str = "0"  # per token beyond the base; of private weights, in place of the base's
    shared: str = "0"  # bytes that all targets of one shape, and other adapters, have in common
    exact: bool = True  # equal to PEFT alone but for the order of additions in float32
    refused: str = ""  # why, where it is


def refused(reason: str) -> Method:
    """The row of a method that is not served."""
    return Method(exact=False, refused=reason)


LORA_MEMORY, LORA_FLOPS = "4*r*(m + n)", "2*r*(m + n)"
# A target is a layer's attention: m numbers in one token's keys, n in its queries.
VIRTUAL_TOKENS = Method("prefix KV", "8*num_virtual_tokens*m", "4*num_virtual_tokens*n")
PRIVATE_MEMORY, PRIVATE_FLOPS = "4*m*n", "2*m*n"

_FROM_BASE = (
    "PEFT decomposes the base's weights anew when it loads it, and the file does not hold the "
    "result: over NF4, which has rounded those weights, it would be another one"
)
_ROUTED = "its weights depend on the input through a router, which the operator does not run"

METHODS: Mapping[str, Method] = {
    # Low rank
    "LORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "ADALORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "LOHA": Method("low-rank", "4*r**2*(m + n)", "2*r**2*(m + n)"),
    "MISS": Method("low-rank", "4*r*m", LORA_FLOPS, shared="4*r*n"),
    "VBLORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "PEANUT": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "POLY": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "VERA": Method("low-rank", "4*(m + r)", "2*r*(m + n) + r + 2*m", shared=LORA_MEMORY),
    "HRA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "GRALORA": Method(
        "low-rank", "4*(gralora_k*r + hybrid_r)*(m + n)", "2*(gralora_k*r + hybrid_r)*(m + n)"
    ),
    "RANDLORA": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "DELORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "TINYLORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "UNILORA": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "PVERA": Method("low-rank", "4*(m + r)", "2*r*(m + n) + r + 2*m", shared=LORA_MEMORY),
    "LILY": refused(
        "its router mixes experts by a mean over all tokens of a batch, so that a reply would "
        "depend on its neighbours"
    ),
    # Scales, biases, norms
    "IA3": Method("scales", "4*m", "m"),
    "BEFT": Method("bias", "4*m", "m"),
    "LN_TUNING": Method("norm", "4*m"),
    "ROAD": Method("operator", "8*m", "3*m"),
    # Rotations and other structured updates
    "OFT": Method("operator", "4*n*oft_block_size", "2*n*oft_block_size"),
    "BOFT": Method(
        "operator",
        "4*(boft_n_butterfly_factor*n*boft_block_size + m)",
        "2*boft_n_butterfly_factor*n*boft_block_size + m",
        shared="4*(boft_n_butterfly_factor - 1)*n",
    ),
    "SHIRA": Method("operator", "8*r*(m + n) + 4*(m + 1)", "2*r*(m + n)"),
    "PSOFT": refused(_FROM_BASE),
    # Private weights
    # Of `rank` as it is served; of rank 0, which is private weights, where those are smaller.
    "LOKR": Method("low-rank", "4*(rank*(m + n) or m*n)", "2*(rank*(m + n) or m*n)"),
    "FOURIERFT": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "WAVEFT": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "C3A": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "HIRA": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "GLORA": Method("private weights", PRIVATE_MEMORY, PRIVATE_FLOPS),
    "SUPERTUNING": Method(
        "operator",
        "8*int(m*n*(1 - sparsity)) + 4*(m + 1) + 4*r*(m + n)",
        "2*int(m*n*(1 - sparsity)) + 2*r*(m + n)",
    ),
    "DEFT": Method("low-rank", LORA_MEMORY, LORA_FLOPS),
    "FROD": refused(_FROM_BASE),
    "ADAMSS": refused(_FROM_BASE),
    "OSF": refused(_FROM_BASE),
    # Virtual tokens and rows of the embedding
    "PROMPT_TUNING": VIRTUAL_TOKENS,
    "MULTITASK_PROMPT_TUNING": VIRTUAL_TOKENS,
    "P_TUNING": VIRTUAL_TOKENS,
    "PREFIX_TUNING": VIRTUAL_TOKENS,
    "CPT": VIRTUAL_TOKENS,
    "CARTRIDGE": VIRTUAL_TOKENS,
    # n: the width of the table. A tied head has the same rows; only there do they cost products.
    "TRAINABLE_TOKENS": Method("embedding rows", "(8 + 4*n)*len(token_indices)"),
    # What runs beside the layers
    # AdapterHub's, no method of PEFT; m: the width of the residual stream.
    "BOTTLENECK": Method("operator", "4*(2*m*r + m + r)", "4*m*r + 2*m + 2*r"),
    "ADAPTION_PROMPT": refused(
        "it adds gated attention to whole layers, which the operator does not run"
    ),
    "SHADOW": refused("it runs a network of its own beside the decoder's layers"),
    "XLORA": refused(
        "a classifier weighs its LoRAs anew for each token, by the hidden states of a first pass "
        "without them: two passes for a step, which the engine does not run; serve its LoRAs each "
        "by itself"
    ),
}

REFUSED_METHODS: Mapping[str, str] = {
    name: method.refused for name, method in METHODS.items() if method.form is None
}
