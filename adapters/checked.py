"""What the checks of an upload found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.limits import Limits
from adapters.promises import Expected
from adapters.safetensors_header import Header
from base.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Validated:
    """What the checks found out about an upload."""

    kind: str  # "lora" | "rslora" | "dora" | "ia3" | ...
    rank: int  # the largest of any target
    targets: tuple[str, ...]  # module paths that it touches, sorted
    config: Mapping[str, Any] = field(hash=False)  # canonical: patterns resolved
    parameters: int  # numbers that the adapter adds
    memory_bytes: int  # what it takes once lowered, in fp32
    vocabulary: int = 0  # rows of its tables, where they are not as many as the base's
    own_tokenizer: bool = False  # the upload's tokenizer says more than the base's


@dataclass(frozen=True, slots=True)
class Checked:
    """What a kind's own checks say, and what is left to look for in the numbers themselves.

    positive  tensors that must hold only numbers > 0
    indices   tensors [k, n] or [n] of whole numbers, and what row i of them counts below: k bounds
    """

    validated: Validated
    positive: frozenset[str] = frozenset()
    indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Checker = Callable[[Mapping[str, Any], Header, BaseSpec, Limits], Checked]


def numbers(found: Mapping[str, Expected], *roles: str) -> int:
    """How many numbers the tensors of these roles hold; without roles, all but the base's own."""
    kept = (e for e in found.values() if (e.role in roles if roles else e.role != "copy"))
    return sum(_count(expected.shape) for expected in kept)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
