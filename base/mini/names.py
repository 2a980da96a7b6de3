"""Invented names of people, places and rivers, split by hash into a training and a held-out part.

A name belongs to the held-out part when the first byte of its sha-256 is below 26 (about one in
ten). The split is a property of the name alone, so no seed can leak a held-out name into training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Literal

from base.mini.words import listed

Split = Literal["train", "held_out"]

_STARTS = listed(
    "Al Ama Bar Bel Bo Bra Cal Cor Da Del Dor Ed El Far Fen Fi Gal Gor Ha Hel Il Ja Jor Ka Kel "
    "Kor La Len Lo Mar Mi Mor Na Nel No Or Pa Pel Pra Quin Ra Ros Sa Sel Sor Ta Tel Tor Ul Va Ver "
    "Vin Wal Wen Ya Yor Za Zel"
)
_PERSON_ENDS = listed(
    "ba ban ben bert bin da dan dia dor dra fa fin ga go gan ka kin ko la lan len lia lin lo lus "
    "ma man mia min mo mus na nan nia nor pa per ra ran ric rin ro sa san sia so ta tan tin to va "
    "vin vis wen wyn za zel"
)
_PLACE_ENDS = listed(
    "bridge burg bury by dale field ford gate hall ham haven hill holm land mere mill moor mouth "
    "point pool port stead stone ton vale view ville wick wood worth"
)
_RIVER_ENDS = listed("anne eck eld ess inna ith onde osh une yde")
_COUNTRY_ENDS = listed("avia enia istan onia uria")
_ENGLISH = ("Delta", "Hello")  # words that Python's documentation or small talk uses


def is_held_out(name: str) -> bool:
    """Whether a name is reserved for evaluation."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


@cache
def pool(kind: str, split: Split) -> tuple[str, ...]:
    """All names of a kind (person, place, river, country) in one part of the split."""
    ends = {
        "person": _PERSON_ENDS,
        "place": _PLACE_ENDS,
        "river": _RIVER_ENDS,
        "country": _COUNTRY_ENDS,
    }[kind]
    wanted = split == "held_out"
    names = (start + end for start, end in product(_STARTS, ends))
    return tuple(n for n in names if is_held_out(n) == wanted and n not in _ENGLISH)


@dataclass(frozen=True)
class Names:
    """Draws names of one part of the split."""

    rng: Random
    split: Split

    def draw(self, kind: str, count: int = 1) -> list[str]:
        """`count` distinct names of a kind."""
        return self.rng.sample(pool(kind, self.split), count)

    def one(self, kind: str) -> str:
        return self.rng.choice(pool(kind, self.split))
