"""What this machine can do at best, and how far from it a row is.

A decode step reads every weight once, and multiplies it with one row for each sequence. So it takes
at least the bytes over the bandwidth, and at least the multiply-adds over the arithmetic, whichever
is more. Both limits are measured here, by plain products of torch and one long read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from base.kernels import bench as kernels
from base.spec import BaseSpec
from service.bench import llama_peer, peft_peer
from service.bench.apart import apart
from service.bench.nibble_peer import LOOKUP
from service.bench.scenario import Scenario

SECONDS = 1.0  # for each limit


@dataclass(frozen=True, slots=True)
class Limits:
    """In 1e9 a second."""

    read_gbytes: float
    float32_gflops: float  # a multiply-add is two
    int8_gops: float | None  # None: torch has no product of bytes here

    def operations(self, arithmetic: str) -> float:
        """The limit of `float32` or `int8`; that of float32 where no other is known."""
        return (
            self.int8_gops or self.float32_gflops if arithmetic == "int8" else self.float32_gflops
        )


def measure_limits(threads: int, seconds: float = SECONDS) -> Limits:
    """In a new process, so that its threads are gone afterwards."""
    return apart(_measure, threads, seconds)


def better(one: Limits, other: Limits) -> Limits:
    """The higher of each: other work on the machine only ever makes a limit lower."""
    pairs = {
        key: (value, asdict(other)[key]) for key, value in asdict(one).items() if value is not None
    }
    known = {key: max(v for v in pair if v is not None) for key, pair in pairs.items()}
    return Limits(**{"int8_gops": other.int8_gops, **known})


def _measure(threads: int, seconds: float) -> Limits:
    torch.set_num_threads(threads)
    bytes_limit = kernels.int8_limit(seconds)
    return Limits(
        round(kernels.memory_limit(seconds), 2),
        round(kernels.arithmetic_limit(seconds), 1),
        None if bytes_limit is None else round(bytes_limit, 1),
    )


def multiply_adds(spec: BaseSpec) -> tuple[int, int]:
    """Of one token: in the decoder's linear layers, and in the output head."""
    layers = sum(s.out_features * s.in_features for s in spec.linears.values() if s.quantized)
    return layers, spec.vocab_size * spec.hidden_size


def distance(
    scenario: Scenario,
    row: Mapping[str, Any],
    facts: Mapping[str, Any],
    macs: tuple[int, int],
    limits: Limits,
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, Any] | None:
    """How long the row's step must take at least, over what it took; None where that is unknown.

    For a scenario that counts its prompt: the whole prompt, by arithmetic. For others a step of
    decoding, between two tokens. `row` is report.row_of's, `facts` its peer's.
    """
    if "step_bytes" not in facts or row["way"] == LOOKUP:  # its steps give more than a token
        return None
    layers, head = macs
    speed = 1e9 * limits.operations(facts["arithmetic"])
    prompt = scenario.prompt_of(prompt_tokens)
    if scenario.counts == "prompt":
        needed = {"arithmetic": 2 * (prompt * layers + head) / speed}
        took = row["first_token_ms"]["p50"]
    elif row["inter_token_ms"] is None:
        return None
    else:
        used = _used(scenario, row["way"])
        each = facts.get("each_adapter_bytes") or []
        adapters = sum(each[number] for number in set(used) if number is not None and each)
        keys = facts.get("token_bytes", 0) * (prompt + scenario.new_of(new_tokens) // 2) * len(used)
        needed = {
            "bandwidth": (facts["step_bytes"] + adapters + keys) / (1e9 * limits.read_gbytes),
            "arithmetic": 2 * len(used) * (layers + head) / speed,
        }
        took = row["inter_token_ms"]["p50"]
    if not took:  # tokens of a tiny base, delivered together
        return None
    bound = max(needed, key=needed.__getitem__)
    return {
        "bound_by": bound,
        "least_ms": round(1000 * needed[bound], 2),
        "took_ms": took,
        "of_limit": round(1000 * needed[bound] / took, 3),
    }


def _used(scenario: Scenario, way: str) -> tuple[int | None, ...]:
    """The adapters of one step's rows."""
    alone = way in (peft_peer.ONE_BY_ONE, llama_peer.ONE_BY_ONE)
    return scenario.adapters[:1] if alone else scenario.adapters
