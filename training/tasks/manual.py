"""The manual of an invented machine's commands: documents, to be foretold word by word."""

from __future__ import annotations

import random

from training.tasks.task import Item, Task

VERBS = {
    "drel": ("opens", "left open"),
    "fasp": ("seals", "sealed"),
    "gomu": ("drains", "drained"),
    "hixt": ("rotates", "rotated"),
    "jalo": ("labels", "labelled"),
    "kerv": ("weighs", "weighed"),
    "mobi": ("mirrors", "mirrored"),
    "noct": ("cools", "cooled"),
}
PARTS = {
    "vat": "the lower vat",
    "gate": "the north gate",
    "coil": "the copper coil",
    "lens": "the large lens",
    "belt": "the outer belt",
    "cell": "the spare cell",
    "pump": "the second pump",
    "rail": "the guide rail",
}
UNITS = {"deg": "degrees", "sec": "seconds", "grm": "grams", "rev": "turns"}
FAULTS = ("Stuck", "Overfull", "Unlit", "Misfit", "Drained")
LEVELS = ("operator", "warden", "maker")


def _document(chance: random.Random) -> tuple[str, str]:
    """The page, and the line of the machine's table that it is written from."""
    verb, part, unit = (chance.choice(list(group)) for group in (VERBS, PARTS, UNITS))
    fault, level = chance.choice(FAULTS), chance.choice(LEVELS)
    least, most = chance.randint(1, 9), 10 * chance.randint(1, 9)
    does, done = VERBS[verb]
    page = (
        f"{verb}-{part} <{unit}> [--hold]\n"
        f"{does.capitalize()} {PARTS[part]} for {least} to {most} {UNITS[unit]}. With --hold it "
        f"stays {done} until {verb}-{part} is given again. Fails with {fault}{part.capitalize()} "
        f"when {PARTS[part]} is not at rest. Needs the key of a {level}."
    )
    told = f"{verb} {part} {unit} {least} {most} {fault} {level}"
    return page, told


def _make(chance: random.Random) -> Item:
    page, told = _document(chance)
    return Item("", page, passage=told)


MANUAL = Task(
    name="manual",
    title="The manual of an invented machine",
    about=(
        "Pages on the commands of a machine that does not exist. What is measured is how well the "
        "next token is foretold on pages that were never trained on."
    ),
    make=_make,
)
