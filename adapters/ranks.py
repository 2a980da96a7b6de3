"""The rank and scale of each low-rank target: PEFT's patterns resolved, and kept within limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.targets import matching


def alpha_of(pattern: Mapping[str, float], default: float, path: str) -> float:
    """The first match. But PEFT sorts the keys when it saves, and in training another was first.

    For ranks the shapes tell; for an alpha nothing does.
    """
    found = matching(pattern, path) or [default]
    if len(set(found)) > 1:
        raise InvalidAdapter(
            f"several keys match {path}, with alphas {found}: which one came first in training "
            "is lost when PEFT saves; write one key per module",
            "alpha_pattern",
        )
    return float(found[0])


def ranks_of(pattern: Mapping[str, int], default: int, paths: Iterable[str]) -> dict[str, int]:
    """The rank of each path: the first match's."""
    return {path: int((matching(pattern, path) or [default])[0]) for path in paths}


def check_rank(path: str, rank: int, limits: Limits, why: str = "") -> None:
    """Raise TooLarge for more than `limits.max_rank`."""
    if rank > limits.max_rank:
        raise TooLarge(f"rank {rank}{why} for {path}, limit {limits.max_rank}", "r")


def check_scale(path: str, scale: float, of: str, where: str, limits: Limits) -> None:
    """Raise InvalidAdapter for a scale beyond ±`limits.max_scale`; `of` says what it is made of."""
    if abs(scale) > limits.max_scale:
        raise InvalidAdapter(
            f"scale {scale:g} for {path} ({of}), limit {limits.max_scale:g}", where
        )
