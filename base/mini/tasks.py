"""Instruction tasks with one right answer, each a function of a random source and a split.

Every task that draws names uses the names of its split; the other tasks draw from spaces so much
larger than the corpus that a held-out item is new by combination (small tables such as the sums
of two digits are the exception, and the card says so).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from base.mini import korean, python_docs, words
from base.mini.dialogue import Document, Turn, chat, listing
from base.mini.names import Names, Split

Task = Callable[[Random, Split, float], Turn]


def _some(rng: Random, split: Split, low: int, high: int) -> list[str]:
    """Distinct everyday words, now and then rare ones, or an invented name among them."""
    rare = rng.random() < 0.2
    group = python_docs.vocabulary(split) if rare else words.EVERYDAY
    found = rng.sample(group, rng.randint(low, high))
    if rng.random() < 0.3:
        found[rng.randrange(len(found))] = Names(rng, split).one("person")
    return found


def _grow(difficulty: float, low: int, high: int) -> int:
    return low + round((high - low) * difficulty)


def copy(rng: Random, split: Split, difficulty: float) -> Turn:
    text = " ".join(_some(rng, split, 1, _grow(difficulty, 3, 8)))
    asked = rng.choice(
        ("Repeat: {}", "Copy this text: {}", "Say exactly: {}", "Repeat after me: {}")
    )
    return Turn(asked.format(text), text)


def reverse(rng: Random, split: Split, difficulty: float) -> Turn:
    found = _some(rng, split, 2, _grow(difficulty, 3, 5))
    asked = rng.choice(("Reverse the words: {}", "Write these words in reverse order: {}"))
    return Turn(asked.format(" ".join(found)), " ".join(reversed(found)))


def reorder(rng: Random, split: Split, difficulty: float) -> Turn:
    found = _some(rng, split, 3, _grow(difficulty, 3, 5))
    if rng.random() < 0.5:
        return Turn(
            f"Move the first word to the end: {' '.join(found)}",
            " ".join([*found[1:], found[0]]),
        )
    return Turn(
        f"Move the last word to the front: {' '.join(found)}",
        " ".join([found[-1], *found[:-1]]),
    )


def pick(rng: Random, split: Split, difficulty: float) -> Turn:
    found = _some(rng, split, 2, _grow(difficulty, 3, 6))
    place = rng.randrange(len(found) + 1)
    if place == len(found):
        return Turn(f"What is the last word? {' '.join(found)}", found[-1])
    return Turn(f"What is the {words.ORDINALS[place]} word? {' '.join(found)}", found[place])


def count_words(rng: Random, split: Split, difficulty: float) -> Turn:
    found = _some(rng, split, 1, _grow(difficulty, 4, 8))
    return Turn(f"How many words are there? {' '.join(found)}", str(len(found)))


def count_things(rng: Random, split: Split, difficulty: float) -> Turn:
    wanted, *others = rng.sample(words.ANIMALS, 3)
    total = rng.randint(1, _grow(difficulty, 4, 8))
    found = [wanted if rng.random() < 0.5 else rng.choice(others) for _ in range(total)]
    return Turn(f"How often does {wanted} occur? {' '.join(found)}", str(found.count(wanted)))


def arithmetic(rng: Random, split: Split, difficulty: float) -> Turn:
    sign = rng.choice("++--×")
    if sign == "×":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return Turn(rng.choice((f"{a} × {b} = ?", f"What is {a} times {b}?")), str(a * b))
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5 * difficulty:
        a += 10 * rng.randint(1, 8)
    if sign == "+":
        return Turn(rng.choice((f"{a} + {b} = ?", f"What is {a} plus {b}?")), str(a + b))
    a, b = max(a, b), min(a, b)
    return Turn(rng.choice((f"{a} - {b} = ?", f"What is {a} minus {b}?")), str(a - b))


def sort_numbers(rng: Random, split: Split, difficulty: float) -> Turn:
    numbers = rng.sample(range(10), rng.randint(2, _grow(difficulty, 3, 5)))
    shown = " ".join(map(str, numbers))
    if rng.random() < 0.3:
        return Turn(f"Which number is the largest? {shown}", str(max(numbers)))
    return Turn(f"Sort the numbers: {shown}", " ".join(map(str, sorted(numbers))))


def sentiment(rng: Random, split: Split, difficulty: float) -> Turn:
    good = rng.random() < 0.5
    word = rng.choice(words.GOOD if good else words.BAD)
    about = rng.choice((*words.OBJECTS, *words.FOODS, "film", "hotel", "story", "trip", "song"))
    name = Names(rng, split).one("person")
    text = rng.choice(
        (
            f"The {about} was {word}.",
            f"I think the {about} is {word}.",
            f"What {word} {about}!",
            f"{name} says that the {about} is very {word}.",
            f"We had a {word} day with {name}.",
            f"{name} was so {word} to us.",
        )
    )
    asked = rng.choice(
        (
            "Is this text positive or negative? {}",
            "Label the sentiment as positive or negative: {}",
        )
    )
    return Turn(asked.format(text), "positive" if good else "negative")


def topic(rng: Random, split: Split, difficulty: float) -> Turn:
    label = rng.choice(tuple(words.TOPICS))
    first, second = rng.sample(words.TOPICS[label], 2)
    name = Names(rng, split).one("person")
    text = rng.choice(
        (
            f"{name} talked about the {first} and the {second}.",
            f"The {first} was better than the {second}.",
            f"We saw a {first} near the {second}.",
            f"{name} reads a book about the {first}.",
        )
    )
    asked = "Which topic is this: sport, food, weather, music or travel? {}"
    return Turn(asked.format(text), label)


def _record(rng: Random, split: Split, count: int) -> dict[str, str | int]:
    names = Names(rng, split)
    fields: dict[str, Callable[[], str | int]] = {
        "name": lambda: names.one("person"),
        "city": lambda: names.one("place"),
        "age": lambda: rng.randint(5, 99),
        "job": lambda: rng.choice(words.JOBS),
        "colour": lambda: rng.choice(words.COLOURS),
        "animal": lambda: rng.choice(words.ANIMALS),
        "day": lambda: rng.choice(words.DAYS),
        "price": lambda: rng.randint(1, 99),
        "item": lambda: rng.choice(words.OBJECTS),
        "year": lambda: rng.randint(1900, 2030),
    }
    return {key: fields[key]() for key in rng.sample(sorted(fields), count)}


def _plain(rng: Random, record: dict[str, str | int]) -> str:
    mark, gap = rng.choice(((": ", "; "), (" = ", ", "), (": ", "\n"), (" is ", ", ")))
    return gap.join(f"{key}{mark}{value}" for key, value in record.items())


def to_json(rng: Random, split: Split, difficulty: float) -> Turn:
    record = _record(rng, split, rng.randint(1, _grow(difficulty, 2, 4)))
    asked = rng.choice(("Write as JSON: {}", "Turn this record into JSON: {}", "JSON: {}"))
    return Turn(asked.format(_plain(rng, record)), json.dumps(record))


def read_field(rng: Random, split: Split, difficulty: float) -> Turn:
    record = _record(rng, split, rng.randint(2, _grow(difficulty, 3, 5)))
    key = rng.choice(list(record))
    shown = json.dumps(record) if rng.random() < 0.6 else _plain(rng, record)
    asked = rng.choice((f"What is the {key}? {shown}", f"{shown}\nGive only the {key}."))
    return Turn(asked, str(record[key]))


def read_table(rng: Random, split: Split, difficulty: float) -> Turn:
    rows = rng.sample(Names(rng, split).draw("person", 6), rng.randint(2, _grow(difficulty, 2, 5)))
    columns = rng.sample(("city", "age", "job", "animal", "colour"), rng.randint(1, 2))
    lists = {"job": words.JOBS, "animal": words.ANIMALS, "colour": words.COLOURS}
    cells = {
        (row, column): Names(rng, split).one("place")
        if column == "city"
        else str(rng.randint(5, 99))
        if column == "age"
        else rng.choice(lists[column])
        for row in rows
        for column in columns
    }
    lines = [["name", *columns], *([row, *(cells[row, c] for c in columns)] for row in rows)]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    row, column = rng.choice(rows), rng.choice(columns)
    return Turn(f"{shown}\n\nWhat is the {column} of {row}?", cells[row, column])


def follow_format(rng: Random, split: Split, difficulty: float) -> Turn:
    found = rng.sample(words.EVERYDAY, rng.randint(2, _grow(difficulty, 2, 5)))
    commas, spaces = ", ".join(found), " ".join(found)
    forms = {
        "Write as a list with dashes": "\n".join(f"- {word}" for word in found),
        "Write as a numbered list": "\n".join(f"{i}. {w}" for i, w in enumerate(found, 1)),
        "Put the words in brackets": " ".join(f"({word})" for word in found),
        "Join the words with commas": commas,
        "Join the words with plus signs": " + ".join(found),
        "Write one word per line": "\n".join(found),
        "Write as a JSON list": json.dumps(found),
        "Start with 'Answer:' and repeat": f"Answer: {spaces}",
        "Repeat in quotes": f'"{spaces}"',
        "Repeat and end with an exclamation mark": f"{spaces}!",
    }
    asked, answer = rng.choice(list(forms.items()))
    shown = commas if rng.random() < 0.3 and "commas" not in asked else spaces
    return Turn(f"{asked}: {shown}", answer)


def upper_case(rng: Random, split: Split, difficulty: float) -> Turn:
    found = rng.sample((*words.COLOURS, *words.ANIMALS), rng.randint(1, _grow(difficulty, 1, 3)))
    text = " ".join(found)
    return Turn(f"Write in upper case: {text}", text.upper())


def replace(rng: Random, split: Split, difficulty: float) -> Turn:
    found = _some(rng, split, 2, _grow(difficulty, 3, 6))
    old, new = rng.choice(found), rng.choice(words.EVERYDAY)
    text = " ".join(new if word == old else word for word in found)
    return Turn(f"Replace {old} with {new}: {' '.join(found)}", text)


def same_rule(rng: Random, split: Split, difficulty: float) -> Turn:
    """Examples of a rule, then one input: the rule is never named."""
    rules: tuple[Callable[[list[str]], str], ...] = (
        lambda w: w[0],
        lambda w: w[-1],
        lambda w: " ".join(reversed(w)),
        lambda w: f"{w[0]} {w[0]}",
        lambda w: f"({' '.join(w)})",
        lambda w: f"{' '.join(w)}!",
        lambda w: f"{w[0]} and {w[-1]}",
    )
    rule = rng.choice(rules)
    size = rng.randint(2, 3)
    shown = [rng.sample(words.EVERYDAY, size) for _ in range(rng.randint(2, 4) + 1)]
    into, out = rng.choice((("Input", "Output"), ("", "->"), ("In", "Out")))
    lines = [f"{' '.join(w)} -> " if not into else f"{into}: {' '.join(w)}\n{out}: " for w in shown]
    told = "\n".join(line + rule(w) for line, w in zip(lines[:-1], shown, strict=False))
    lead = rng.choice(("Apply the same rule as the examples.\n", "Continue.\n", ""))
    return Turn(f"{lead}{told}\n{lines[-1].rstrip()}", rule(shown[-1]))


def same_label(rng: Random, split: Split, difficulty: float) -> Turn:
    """Words with arbitrary labels, then one of the words again or another of its group."""
    groups = rng.sample((words.ANIMALS, words.FOODS, words.COLOURS, words.JOBS, words.ROOMS), 2)
    labels = rng.sample(("A", "B", "C", "X", "Y", "red", "blue", "one", "two", "yes", "no"), 2)
    drawn = [(rng.choice(groups[i % 2]), labels[i % 2]) for i in range(rng.choice((4, 6)))]
    rng.shuffle(drawn)
    word, label = rng.choice([(rng.choice(groups[i]), labels[i]) for i in (0, 1)])
    shown = "\n".join(f"{w} -> {mark}" for w, mark in drawn)
    lead = rng.choice(("Label the last word like the examples.\n", ""))
    return Turn(f"{lead}{shown}\n{word} ->", label)


def talk(rng: Random, split: Split, difficulty: float) -> Turn:
    """Small talk, so that a bare prompt gets a sensible reply."""
    name = Names(rng, split).one("person")
    hello = rng.choice(("Hello", "Hi", "Good morning", "Good evening", "Hey"))
    return rng.choice(
        (
            Turn(f"{hello}!", f"{hello}! How can I help you?"),
            Turn(f"{hello}", f"{hello}! How can I help you?"),
            Turn(f"{hello}, I am {name}.", f"{hello}, {name}! How can I help you?"),
            Turn("Who are you?", "I am mini, a small language model."),
            Turn("What is your name?", "My name is mini."),
            Turn("What can you do?", "I can answer questions from a text and do small tasks."),
            Turn("Thank you!", "You are welcome!"),
            Turn("Thanks.", "You are welcome!"),
            Turn("Goodbye!", "Goodbye!"),
        )
    )


TASKS: dict[str, tuple[Task, float]] = {
    "copy": (copy, 1.5),
    "reverse": (reverse, 3.0),
    "reorder": (reorder, 3.0),
    "pick": (pick, 1.5),
    "count_words": (count_words, 1.5),
    "count_things": (count_things, 2.0),
    "arithmetic": (arithmetic, 3.0),
    "sort_numbers": (sort_numbers, 1.2),
    "sentiment": (sentiment, 0.8),
    "topic": (topic, 0.3),
    "to_json": (to_json, 0.7),
    "read_field": (read_field, 0.8),
    "read_table": (read_table, 2.2),
    "follow_format": (follow_format, 1.4),
    "upper_case": (upper_case, 0.8),
    "replace": (replace, 4.0),
    "same_rule": (same_rule, 3.0),
    "same_label": (same_label, 2.5),
    "talk": (talk, 0.15),
    "korean_copy": (korean.copy, 0.8),
    "korean_answer": (korean.answer, 0.6),
    "korean_word": (korean.word, 0.25),
}
_SYSTEMS = ("You are a helpful assistant.", "Answer shortly.", "Follow the instruction exactly.")


def draw(rng: Random) -> Task:
    tasks, weights = zip(*TASKS.values(), strict=True)
    chosen: Task = rng.choices(tasks, weights)[0]
    return chosen


def document(rng: Random, split: Split, difficulty: float) -> Document:
    """A few tasks as a conversation, or one kind of task many times as plain lines."""
    if rng.random() < 0.4:
        task = draw(rng)
        turns = [task(rng, split, difficulty) for _ in range(rng.randint(2, 7))]
        return listing("", turns, rng.choice((("Q", "A"), ("Task", "Answer"))))
    system = rng.choice(_SYSTEMS) if rng.random() < 0.35 else None
    turns = [draw(rng)(rng, split, difficulty) for _ in range(rng.choice((1, 1, 2, 3)))]
    return chat(turns, system)
