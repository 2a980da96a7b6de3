"""Which form of a Korean particle follows a word: 은 or 는, 이 or 가, 을 or 를.

The first form stands after a final consonant, the second after a vowel. Words are made of frequent
syllables; the tested ones were never trained on.
"""

from __future__ import annotations

import random

from base.mini.korean import FREQUENT
from training.tasks.task import Item, Task

PAIRS = (("은", "는"), ("이", "가"), ("을", "를"))
RULE = "받침이 있으면 {}, 없으면 {}."  # with a final consonant the one, without it the other


def closed(word: str) -> bool:
    """Does the last syllable end in a consonant? Unicode lays 28 endings out for each beginning."""
    return (ord(word[-1]) - 0xAC00) % 28 != 0


ENDINGS = 60  # last syllables of each sort: every one is seen in training, in other words
CLOSED = tuple(filter(closed, FREQUENT))[:ENDINGS]
OPEN = tuple(syllable for syllable in FREQUENT if not closed(syllable))[:ENDINGS]


def particle(word: str, pair: tuple[str, str]) -> str:
    """The form of the pair that follows the word."""
    return pair[0] if closed(word) else pair[1]


def _make(chance: random.Random) -> Item:
    """Both forms are as frequent, though two syllables in three end in a vowel."""
    last = chance.choice(CLOSED if chance.random() < 0.5 else OPEN)
    word = "".join(chance.choices(FREQUENT, k=chance.randint(0, 2))) + last
    pair = chance.choice(PAIRS)
    ending = "받침이 있습니다." if closed(word) else "받침이 없습니다."
    passage = f"{RULE.format(*pair)} {word}: {ending}"
    return Item(f"조사 {pair[0]}/{pair[1]}: {word}", particle(word, pair), pair, passage)


PARTICLES = Task(
    name="particles",
    title="A Korean rule: which particle",
    about=(
        "`조사 은/는:` and a word; the answer is the form that Korean puts after it, decided by "
        "the last syllable's final consonant. The tested words were never trained on."
    ),
    make=_make,
)
