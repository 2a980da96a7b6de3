"""A table of 200 invented facts, asked for in many wordings.

Every fact is there to be learnt; what is held out is the wording, so a test question is a known
fact in words that it was never asked in.
"""

from __future__ import annotations

import random

from training.tasks.task import Item, Task

SUBJECTS = 50
RELATIONS = {
    "colour": ("red", "blue", "green", "white", "black", "brown", "yellow", "grey"),
    "animal": ("dog", "cat", "horse", "cow", "bird", "rabbit", "fox", "goat", "duck", "sheep"),
    "metal": ("gold", "silver", "iron", "copper", "tin", "lead", "steel", "zinc"),
    "month": ("January", "March", "April", "May", "June", "July", "August", "October"),
}
WORDINGS = (
    "What is the {r} of {s}?",
    "Which {r} does {s} have?",
    "Name the {r} of {s}.",
    "Tell me the {r} of {s}.",
    "Give the {r} of {s}.",
    "{s} has which {r}?",
    "Which {r} belongs to {s}?",
    "Do you know the {r} of {s}?",
    "I need the {r} of {s}.",
    "Say the {r} of {s}.",
    "For {s}, what is the {r}?",
    "What {r} is that of {s}?",
    "The {r} of {s} is?",
    "Please look up the {r} of {s}.",
    "What was the {r} of {s}?",
)
_STARTS = ("Al", "Bri", "Cre", "Dul", "Em", "Fro", "Gli", "Hu", "Iv", "Jo", "Kra", "Lu", "Mo")
_ENDS = ("bena", "cote", "dwin", "fora", "gast", "lith", "mund", "pira", "stad", "vane")


def _table() -> dict[tuple[str, str], str]:
    """(subject, relation) -> value; the same on every machine."""
    chance = random.Random("two hundred facts")
    names = [start + end for start in _STARTS for end in _ENDS]
    return {
        (name, relation): chance.choice(values)
        for name in chance.sample(names, SUBJECTS)
        for relation, values in RELATIONS.items()
    }


TABLE = _table()


def passage(subject: str, relation: str) -> str:
    """The fact as a sentence."""
    return f"The {relation} of {subject} is {TABLE[subject, relation]}."


def _make(chance: random.Random) -> Item:
    subject, relation = chance.choice(list(TABLE))
    question = chance.choice(WORDINGS).format(s=subject, r=relation)
    answer = TABLE[subject, relation]
    return Item(question, answer, passage=passage(subject, relation))


FACTS = Task(
    name="facts",
    title="A table of 200 invented facts",
    about=(
        f"Colour, animal, metal and month of {SUBJECTS} invented places, each asked for in "
        f"{len(WORDINGS)} wordings. The tested wordings of a fact were never trained on; the fact "
        "was, in others."
    ),
    make=_make,
    passages=tuple(passage(*key) for key in TABLE),
)
