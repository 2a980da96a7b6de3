"""What a soak finds in what it has seen, and a short one. The long form is soak.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from adapters.limits import MIB
from tests.reliability.served import Seen, serving
from tests.reliability.soak import FLAGS, Soak, judge, material, soaked


def watched(change: Callable[[Seen, float], Seen]) -> Soak:
    """Two hours of looks at a process whose memory wavers by some MiB."""
    chance = Random(1)
    looks = []
    for number in range(1440):
        hours = number / 720
        memory = 500 * MIB + int(chance.gauss(0, 2 * MIB))
        looks.append(change(Seen(3600 * hours, memory, 30 + number % 3, 20, 5), hours))
    return Soak(looks=looks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda seen, hours: seen, ""),
        (lambda seen, hours: replace(seen, memory=seen.memory + int(5 * MIB * hours)), "memory"),
        (lambda seen, hours: replace(seen, memory=seen.memory + int(40 * MIB * (hours > 0.2))), ""),
        (
            lambda seen, hours: replace(seen, descriptors=seen.descriptors + int(9 * hours)),
            "descriptors",
        ),
        (lambda seen, hours: replace(seen, tasks=seen.tasks + int(9 * hours)), "tasks"),
        (lambda seen, hours: replace(seen, threads=seen.threads + int(9 * hours)), "threads"),
    ],
    ids=["flat", "memory", "once", "descriptors", "tasks", "threads"],
)
def test_what_grows_is_found(change: Callable[[Seen, float], Seen], words: str) -> None:
    found = judge(watched(change))
    assert len(found) == bool(words), found
    assert not words or found[0].startswith(words)


def test_what_went_wrong_is_told() -> None:
    soak = watched(lambda seen, hours: seen)
    soak.wrong["request: 500"] += 2
    assert judge(soak) == ["request: 500 (2 times)"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_minutes(tmp_path: Path) -> None:
    """Too short for memory: what else grows, and what is answered with 500, shows."""
    base, uploads = material(tmp_path)
    with serving(tmp_path / "run", "--base", str(base), *FLAGS) as served:
        soak = asyncio.run(soaked(served, uploads, 90, pause=0.1, every=1.0))
        assert served.stop() == 0
    print(soak)
    assert [one for one in judge(soak) if not one.startswith("memory")] == []
    assert soak.done["upload 201"] > 5
    assert soak.done["left stream"] > 5
