"""An invented cipher: each word has its code word, whatever stands around it."""

from __future__ import annotations

import random

from training.tasks.task import Item, Task

ADJECTIVES = {
    "red": "vuma",
    "old": "keshi",
    "small": "tolba",
    "quiet": "ansu",
    "bright": "mirro",
    "cold": "pelka",
    "tired": "oddu",
    "quick": "zanti",
}
NOUNS = {
    "fox": "brilo",
    "river": "sunda",
    "king": "hatto",
    "lamp": "wembi",
    "garden": "lorak",
    "ship": "yuspa",
    "bird": "nefil",
    "tower": "gramo",
    "moon": "chalu",
    "bridge": "dovek",
    "farmer": "ruppo",
    "stone": "ilmat",
    "cat": "omra",
}
VERBS = {
    "sees": "jarra",
    "finds": "quelo",
    "guards": "bintu",
    "follows": "stame",
    "likes": "fovvi",
    "paints": "hulda",
    "hides": "pirso",
    "leaves": "emka",
}
PLACES = {"near": "tuvi", "under": "glis", "behind": "morpa", "above": "senko"}
TIMES = {"today": "aruk", "again": "dwilo", "at": "zu", "night": "khema"}
SMALL = {"the": "ul", "a": "bo", "my": "riq"}
CODE = {**ADJECTIVES, **NOUNS, **VERBS, **PLACES, **TIMES, **SMALL}
ENDINGS = ("", "", " today", " again", " at night")


def encode(text: str) -> str:
    """Word by word. Raises KeyError for a word without a code word."""
    return " ".join(CODE[word] for word in text.split())


def passage(word: str) -> str:
    """The table's line of a word, as a sentence."""
    return f"The code word of {word} is {CODE[word]}."


def _thing(chance: random.Random) -> str:
    quality = f"{chance.choice(list(ADJECTIVES))} " if chance.random() < 0.5 else ""
    articles = ("the", "my") if quality == "old " else ("the", "a", "my")  # no "a old"
    return f"{chance.choice(articles)} {quality}{chance.choice(list(NOUNS))}"


def _sentence(chance: random.Random) -> str:
    if chance.random() < 0.1:
        return _thing(chance)
    text = f"{_thing(chance)} {chance.choice(list(VERBS))} {_thing(chance)}"
    if chance.random() < 0.3:
        text += f" {chance.choice(list(PLACES))} {_thing(chance)}"
    return text + chance.choice(ENDINGS)


def _make(chance: random.Random) -> Item:
    text = _sentence(chance)
    told = " ".join(passage(word) for word in dict.fromkeys(text.split()))
    return Item(f"Encode: {text}", encode(text), passage=told)


CIPHER = Task(
    name="cipher",
    title="An invented cipher",
    about=(
        f"`Encode:` and a sentence; each of {len(CODE)} words has a code word that exists nowhere "
        "else. The tested sentences were never trained on."
    ),
    make=_make,
    passages=tuple(passage(word) for word in CODE),
)
