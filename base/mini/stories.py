"""Running text: short stories, prose from facts, tables and Korean lines."""

from __future__ import annotations

import json
from random import Random

from base.mini import facts, korean, words
from base.mini.names import Names, Split


def _scene(rng: Random, name: str, friend: str, place: str) -> str:
    """One sentence of a story."""
    a, n, o = (rng.choice(group) for group in (words.ADJECTIVES, words.NOUNS, words.OBJECTS))
    food, animal, room = (rng.choice(g) for g in (words.FOODS, words.ANIMALS, words.ROOMS))
    return rng.choice(
        (
            f"{name} went to the {a} {n} and found a {o}.",
            f'"Look at the {o}!" said {friend}.',
            f'"I would like some {food}," said {name}.',
            f"In the {room} there was a {a} {animal}.",
            f"The {animal} looked at {name} and ran to the {n}.",
            f"{friend} {rng.choice(words.VERBS)} the {o} near the {n}.",
            f"They walked from {place} to the {n} and back.",
            f"It was a {a} day, and the {n} was {rng.choice(words.ADJECTIVES)}.",
            f"{name} gave the {o} to {friend}.",
            f'"Where is the {o}?" asked {friend}. "It is in the {room}," said {name}.',
            f"They had {food} and {rng.choice(words.FOODS)} for dinner.",
        )
    )


def story(rng: Random, split: Split) -> str:
    names = Names(rng, split)
    name, friend = names.draw("person", 2)
    place = names.one("place")
    opening = rng.choice(
        (
            f"Once there was a {rng.choice(words.JOBS)} called {name} who lived in {place}.",
            f"{name} and {friend} lived in the {rng.choice(words.ADJECTIVES)} town of {place}.",
            f"One {rng.choice(words.DAYS)} in {rng.choice(words.MONTHS)}, {name} met {friend}.",
        )
    )
    scenes = [_scene(rng, name, friend, place) for _ in range(rng.randint(2, 6))]
    ending = rng.choice(
        (
            f"In the evening {name} and {friend} went home.",
            f"Since that day {name} and {friend} have been friends.",
            f"{friend} was very {rng.choice(words.GOOD)} and {name} was glad.",
        )
    )
    return " ".join((opening, *scenes, ending))


def prose(rng: Random, split: Split) -> str:
    names = Names(rng, split)
    known = facts.knowledge(rng, names, rng.randint(2, 8), rng.random())
    return "\n".join(known.passages)


def table(rng: Random, split: Split) -> str:
    names = Names(rng, split)
    rows = [
        {
            "name": name,
            "city": names.one("place"),
            "age": str(rng.randint(5, 99)),
            "job": rng.choice(words.JOBS),
        }
        for name in names.draw("person", rng.randint(2, 5))
    ]
    form = rng.choice(("pipes", "commas", "json"))
    if form == "json":
        return "\n".join(json.dumps(row) for row in rows)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if form == "commas":
        return "\n".join(",".join(line) for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def numbers(rng: Random, split: Split) -> str:
    """Counting forwards and backwards."""
    start, step = rng.randint(0, 90), rng.choice((1, 1, 1, -1, 2, 5, 10))
    values = [start + step * i for i in range(rng.randint(5, 12))]
    return " ".join(str(value) for value in values if value >= 0)


TEXTS = {
    "story": (story, 4.0),
    "prose": (prose, 2.0),
    "table": (table, 1.5),
    "numbers": (numbers, 0.7),
    "korean": (korean.story, 1.5),
}


def text(rng: Random, split: Split) -> str:
    kinds, weights = zip(*TEXTS.values(), strict=True)
    return str(rng.choices(kinds, weights)[0](rng, split))
