"""Records of invented people -> a JSON format that exists nowhere else."""

from __future__ import annotations

import json
import random

from training.tasks.task import Item, Task

STARTS = ("Bel", "Cor", "Dran", "Fel", "Gar", "Hol", "Jun", "Kel", "Lor", "Mer", "Nor", "Pel")
MIDDLES = ("", "", "a", "i", "o", "an", "ev", "il", "or")
ENDS = ("da", "den", "dis", "ka", "lan", "mar", "na", "nor", "ra", "rin", "ta", "vin")
JOBS = ("baker", "painter", "teacher", "farmer", "doctor", "writer", "driver", "singer")
STATES = {"active": True, "closed": False}  # what the format keeps of the state
RULE = (
    "The format is a JSON object with who, of, at and ok. The name is who. The job is of. "
    "The city and the age are at, as a list. The state active is true in ok, closed is false."
)


def _name(chance: random.Random) -> str:
    return chance.choice(STARTS) + chance.choice(MIDDLES) + chance.choice(ENDS)


def encode(name: str, city: str, age: int, job: str, state: str) -> str:
    """The record in the invented format."""
    return json.dumps({"who": name, "of": job, "at": [city, age], "ok": STATES[state]})


def _make(chance: random.Random) -> Item:
    record = {
        "name": _name(chance),
        "city": _name(chance),
        "age": chance.randint(5, 99),
        "job": chance.choice(JOBS),
        "state": chance.choice(list(STATES)),
    }
    shown = list(record.items())
    chance.shuffle(shown)
    text = "; ".join(f"{field}: {value}" for field, value in shown)
    return Item(f"Record: {text}", encode(**record), passage=RULE)  # type: ignore[arg-type]


RECORDS = Task(
    name="records",
    title="Records to a new JSON format",
    about=(
        "`Record:` and five fields in any order; the answer is one JSON object whose keys, order "
        "and nesting exist nowhere else. The tested records were never trained on."
    ),
    make=_make,
    passages=tuple(f"{sentence}." for sentence in RULE.rstrip(".").split(". ")),
)
