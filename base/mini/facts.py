"""Passages of facts about invented people, places, things and companies, and questions on them.

Later retrieval stands on this: the answer is always a span of the passages, or that they lack it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from base.mini import python_docs, words
from base.mini.dialogue import Document, Turn, chat, listing
from base.mini.names import Names, Split

UNKNOWN = "I do not know."
SYSTEMS = (
    "Answer from the passages.",
    "Answer from the passage.",
    "Answer the question from the text.",
    "Use only the given passages. If they do not contain the answer, say that you do not know.",
    "Answer shortly.",
)


@dataclass(frozen=True)
class Relation:
    """How a property is told ({n} the subject, {v} the value) and asked about."""

    values: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    reverse: tuple[str, ...] = ()


PERSON = (
    Relation(
        "place",
        ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}."),
        ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?"),
        ("Who lives in {v}?", "Who has a home in {v}?"),
    ),
    Relation(
        "job",
        ("{n} works as a {v}.", "{n} is a {v}.", "The job of {n} is {v}."),
        ("What is the job of {n}?", "What does {n} work as?", "What does {n} do for a living?"),
        ("Who works as a {v}?", "Who is a {v}?"),
    ),
    Relation(
        "food",
        ("{n} likes to eat {v}.", "The favourite food of {n} is {v}.", "{n} eats a lot of {v}."),
        ("What does {n} like to eat?", "What is the favourite food of {n}?", "What does {n} eat?"),
        ("Who likes to eat {v}?",),
    ),
    Relation(
        "animal",
        ("{n} has a {v}.", "{n} keeps a {v} at home.", "The pet of {n} is a {v}."),
        ("Which animal does {n} have?", "What is the pet of {n}?", "What pet does {n} keep?"),
        ("Who has a {v}?", "Who keeps a {v}?"),
    ),
    Relation(
        "year",
        ("{n} was born in {v}.", "{n} was born in the year {v}."),
        ("When was {n} born?", "In which year was {n} born?"),
        ("Who was born in {v}?",),
    ),
    Relation(
        "colour",
        ("The favourite colour of {n} is {v}.", "{n} likes the colour {v}."),
        ("What is the favourite colour of {n}?", "Which colour does {n} like?"),
        ("Who likes the colour {v}?",),
    ),
    Relation(
        "instrument",
        ("{n} plays the {v}.", "{n} has learnt to play the {v}."),
        ("Which instrument does {n} play?", "What does {n} play?"),
        ("Who plays the {v}?",),
    ),
    Relation(
        "age",
        ("{n} is {v} years old.", "The age of {n} is {v}."),
        ("How old is {n}?", "What is the age of {n}?"),
        ("Who is {v} years old?",),
    ),
    Relation(
        "person",
        ("{n} is a friend of {v}.", "The best friend of {n} is {v}."),
        ("Who is the friend of {n}?", "Who is the best friend of {n}?"),
    ),
    Relation(
        "subject",
        ("{n} studies {v}.", "{n} is a student of {v}."),
        ("What does {n} study?", "Which subject does {n} study?"),
        ("Who studies {v}?",),
    ),
    Relation(
        "vehicle",
        ("{n} drives a {v}.", "{n} travels by {v}."),
        ("What does {n} drive?", "How does {n} travel?"),
        ("Who drives a {v}?",),
    ),
    Relation(
        "code",
        ("The code of {n} is {v}.", "{n} has the code {v}."),
        ("What is the code of {n}?", "Which code does {n} have?"),
        ("Who has the code {v}?",),
    ),
    Relation(
        "object",
        ("{n} bought a {v}.", "Yesterday {n} bought a {v}."),
        ("What did {n} buy?", "What did {n} buy yesterday?"),
        ("Who bought a {v}?",),
    ),
    Relation(
        "object",
        ("{n} lost a {v}.", "Last week {n} lost a {v}."),
        ("What did {n} lose?", "What has {n} lost?"),
        ("Who lost a {v}?",),
    ),
)
PLACE = (
    Relation(
        "river",
        ("{n} lies on the river {v}.", "The river {v} flows through {n}."),
        ("On which river does {n} lie?", "Which river flows through {n}?"),
        ("Which town lies on the river {v}?",),
    ),
    Relation(
        "food",
        ("{n} is known for its {v}.", "The town of {n} is famous for {v}."),
        ("What is {n} known for?", "What is {n} famous for?"),
        ("Which town is known for its {v}?",),
    ),
    Relation(
        "person",
        ("The mayor of {n} is {v}.", "{v} is the mayor of {n}."),
        ("Who is the mayor of {n}?", "What is the name of the mayor of {n}?"),
        ("Of which town is {v} the mayor?",),
    ),
    Relation(
        "year",
        ("{n} was founded in {v}.", "{n} was built in the year {v}."),
        ("When was {n} founded?", "When was {n} built?"),
        ("Which town was founded in {v}?",),
    ),
    Relation(
        "count",
        ("{n} has {v} inhabitants.", "There are {v} people in {n}."),
        ("How many inhabitants does {n} have?", "How many people live in {n}?"),
    ),
    Relation(
        "country",
        ("{n} is a town in {v}.", "{n} belongs to the country of {v}."),
        ("In which country is {n}?", "To which country does {n} belong?"),
    ),
    Relation(
        "day",
        ("The market of {n} is held on {v}.", "In {n} the market is on {v}."),
        ("When is the market of {n} held?", "On which day is the market of {n}?"),
    ),
)
THING = (
    Relation(
        "room",
        ("{n} is in the {v}.", "{n} lies in the {v}.", "You can find {n} in the {v}."),
        ("Where is {n}?", "Where can I find {n}?"),
        ("What is in the {v}?",),
    ),
    Relation(
        "price",
        ("{n} costs {v} coins.", "The price of {n} is {v} coins."),
        ("How much does {n} cost?", "What is the price of {n}?"),
    ),
    Relation(
        "person",
        ("{n} belongs to {v}.", "{v} owns {n}."),
        ("Who owns {n}?", "To whom does {n} belong?"),
        ("What does {v} own?",),
    ),
)
COMPANY = (
    Relation(
        "goods",
        ("{n} makes {v}.", "{n} is a company that makes {v}."),
        ("What does {n} make?", "What does the company {n} make?"),
        ("Which company makes {v}?",),
    ),
    Relation(
        "place",
        ("The office of {n} is in {v}.", "{n} has its office in {v}."),
        ("Where is the office of {n}?", "In which town is the office of {n}?"),
    ),
    Relation(
        "person",
        ("The head of {n} is {v}.", "{n} is led by {v}."),
        ("Who is the head of {n}?", "Who leads {n}?"),
        ("Which company is led by {v}?",),
    ),
    Relation(
        "month",
        ("{n} opened in {v}.", "{n} was opened in {v}."),
        ("When did {n} open?", "In which month did {n} open?"),
    ),
    Relation(
        "age",
        ("{n} has {v} workers.", "{v} people work for {n}."),
        ("How many workers does {n} have?", "How many people work for {n}?"),
    ),
)
RELATIONS = {"person": PERSON, "place": PLACE, "thing": THING, "company": COMPANY}

_FILLERS = (
    "The weather was fine that day.",
    "Nobody knows why.",
    "This has been so for many years.",
    "People talk about it often.",
    "It is a well known story.",
    "Many visitors come in summer.",
    "The evening was quiet.",
)
_LISTS = {
    "job": words.JOBS,
    "food": words.FOODS,
    "animal": words.ANIMALS,
    "colour": words.COLOURS,
    "instrument": words.INSTRUMENTS,
    "subject": words.SUBJECTS,
    "vehicle": words.VEHICLES,
    "object": words.OBJECTS,
    "room": words.ROOMS,
    "day": words.DAYS,
    "month": words.MONTHS,
}


@dataclass(frozen=True)
class Fact:
    kind: str
    subject: str
    relation: Relation
    value: str


@dataclass(frozen=True)
class Knowledge:
    """Facts and the passages that tell them."""

    facts: tuple[Fact, ...]
    passages: tuple[str, ...]


def _value(rng: Random, names: Names, kind: str) -> str:
    if kind in ("person", "place", "river", "country"):
        return names.one(kind)
    if kind in _LISTS:
        return rng.choice(_LISTS[kind])
    if kind == "word":
        return rng.choice(words.EVERYDAY)
    if kind in ("phrase", "spot"):
        phrase = f"the {rng.choice(words.ADJECTIVES)} {rng.choice((*words.NOUNS, *words.OBJECTS))}"
        return phrase if kind == "phrase" else f"{rng.choice(words.NEAR)} {phrase}"
    if kind == "hour":
        return f"{rng.randint(1, 12)} in the {rng.choice(('morning', 'afternoon', 'evening'))}"
    if kind == "goods":
        return rng.choice(words.OBJECTS) + "s"
    if kind == "code":
        return rng.choice("ABCDEFGHKLMNPRST") + str(rng.randint(10, 999))
    low, high = {"year": (1700, 2020), "age": (5, 99), "price": (2, 99), "count": (100, 9999)}[kind]
    return str(rng.randint(low, high))


def _open_relation(rng: Random) -> Relation:
    """A property in words of its own, so that answering does not hang on a few wordings."""
    form = rng.choice(("property", "property", "action", "action", "rest", "hour"))
    if form == "property":
        noun = rng.choice((*words.NOUNS, *words.OBJECTS))
        return Relation(
            rng.choice(("phrase", "word", "person", "place", "price")),
            (f"The {noun} of {{n}} is {{v}}.",),
            (f"What is the {noun} of {{n}}?", f"Tell me the {noun} of {{n}}."),
        )
    if form == "action":
        verb = rng.choice(words.ACTIONS)
        return Relation(
            "phrase",
            (f"{{n}} {words.third(verb)} {{v}}.",),
            (f"What does {{n}} {verb}?",),
            (f"Who {words.third(verb)} {{v}}?",),
        )
    if form == "rest":
        verb = rng.choice(words.RESTS)
        return Relation(
            "spot", (f"{{n}} {words.third(verb)} {{v}}.",), (f"Where does {{n}} {verb}?",)
        )
    verb = rng.choice(("arrive", "close", "come", "end", "leave", "open", "start", "stop"))
    asked = (f"When does {{n}} {verb}?", f"At what time does {{n}} {verb}?")
    return Relation("hour", (f"{{n}} {words.third(verb)} at {{v}}.",), asked)


def _relations(rng: Random, kind: str, count: int) -> list[Relation]:
    """`count` relations for a subject, one in four of them open."""
    own = RELATIONS[kind]
    found = list(rng.sample(own, min(count, len(own))))
    for i in range(len(found)):
        if rng.random() < 0.25 and (relation := _open_relation(rng)) not in found:
            found[i] = relation
    return found


def _subject(rng: Random, names: Names, kind: str) -> str:
    if kind == "thing":
        return f"the {rng.choice(words.COLOURS)} {rng.choice(words.OBJECTS)}"
    if kind == "company":
        return f"{names.one('place')} {rng.choice(('Works', 'Company', 'Trading', 'House'))}"
    if kind == "person" and rng.random() < 0.2:
        first, last = names.draw("person", 2)
        return rng.choice((f"{first} {last}", f"{first} {last}", f"Mr. {last}", f"Mrs. {last}"))
    return names.one(kind)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _about(rng: Random, names: Names, count: int, used: set[str]) -> list[Fact]:
    """`count` facts about one new subject; no value of the same kind is used twice."""
    kind = rng.choices(("person", "place", "thing", "company"), (6, 2, 1, 1))[0]
    subject = _subject(rng, names, kind)
    while subject in used:
        subject = _subject(rng, names, kind)
    used.add(subject)
    facts = []
    for relation in _relations(rng, kind, count):
        value = _value(rng, names, relation.values)
        while value in used:
            value = _value(rng, names, relation.values)
        used.add(value)
        facts.append(Fact(kind, subject, relation, value))
    return facts


def _tell(rng: Random, fact: Fact, pronoun: str | None) -> str:
    told = rng.choice(fact.relation.told)
    if pronoun and told.startswith("{n} "):
        return told.replace("{n}", pronoun).format(v=fact.value)
    return _capital(told.format(n=fact.subject, v=fact.value))


def _passage(rng: Random, facts: list[Fact], difficulty: float) -> str:
    """Facts of one subject; from the second sentence on a pronoun may stand for it."""
    person = facts[0].kind == "person"
    pronoun = rng.choice(("He", "She")) if person else "It"
    told = [_tell(rng, facts[0], None)]
    for fact in facts[1:]:
        told.append(_tell(rng, fact, pronoun if rng.random() < 0.3 * difficulty else None))
    if rng.random() < 0.15 * difficulty:
        told.insert(rng.randrange(len(told) + 1), rng.choice(_FILLERS))
    return " ".join(told)


def knowledge(rng: Random, names: Names, count: int, difficulty: float) -> Knowledge:
    """`count` facts about one to `count` subjects, told in one passage per subject or mixed."""
    used: set[str] = set()
    groups: list[list[Fact]] = []
    while (left := count - sum(map(len, groups))) > 0:
        groups.append(_about(rng, names, rng.randint(1, min(left, 4)), used))
    facts = [fact for group in groups for fact in group]
    if rng.random() < 0.35:
        rng.shuffle(facts)
        return Knowledge(tuple(facts), (" ".join(_tell(rng, fact, None) for fact in facts),))
    passages = tuple(_passage(rng, group, difficulty) for group in groups)
    if rng.random() < 0.3:
        passages = (" ".join(passages),)
    return Knowledge(tuple(facts), passages)


def _unknown(rng: Random, names: Names, known: Knowledge) -> Turn:
    """A question whose answer the passages lack: another subject, or another property."""
    told = {(fact.subject, fact.relation) for fact in known.facts}
    fact = rng.choice(known.facts)
    group = RELATIONS[fact.kind]
    others = [relation for relation in group if (fact.subject, relation) not in told]
    if others and rng.random() < 0.5:
        asked = rng.choice(rng.choice(others).asked)
        return Turn(_capital(asked.format(n=fact.subject)), UNKNOWN)
    stranger = names.one("person")
    subjects = {fact.subject for fact in known.facts} | {fact.value for fact in known.facts}
    while stranger in subjects:
        stranger = names.one("person")
    return Turn(rng.choice(rng.choice(PERSON).asked).format(n=stranger), UNKNOWN)


def _ask(rng: Random, fact: Fact) -> Turn:
    if fact.relation.reverse and rng.random() < 0.2:
        asked = rng.choice(fact.relation.reverse).format(v=fact.value)
        return Turn(_capital(asked), fact.subject)
    return Turn(_capital(rng.choice(fact.relation.asked).format(n=fact.subject)), fact.value)


def ask(
    rng: Random, names: Names, known: Knowledge, count: int, unknown: float = 0.08
) -> list[Turn]:
    """`count` questions on the passages, spread over the facts, some without an answer."""
    facts: list[Fact] = []
    while len(facts) < count:
        facts += rng.sample(known.facts, len(known.facts))
    return [
        _unknown(rng, names, known) if rng.random() < unknown else _ask(rng, fact)
        for fact in facts[:count]
    ]


def context(rng: Random, passages: tuple[str, ...]) -> str:
    """The passages as a prompt shows them: bare, headed, or numbered."""
    if len(passages) == 1 and rng.random() < 0.6:
        return rng.choice(("{}", "Passage: {}", "Text: {}", "Passage:\n{}")).format(passages[0])
    style = rng.choice(("[{}] {}", "[{}] {}", "Passage {}: {}", "{}. {}"))
    shown = "\n".join(style.format(i, text) for i, text in enumerate(passages, 1))
    return rng.choice(("{}", "Passages:\n{}", "Passages:\n\n{}")).format(shown)


def first_question(rng: Random, shown: str, turn: Turn) -> Turn:
    """The passages and the first question in one user turn."""
    lead = rng.choice(("\n\nQuestion: ", "\nQuestion: ", "\n\n", "\n"))
    return Turn(f"{shown}{lead}{turn.user}", turn.assistant)


def _beside_other_text(rng: Random, split: Split, passages: tuple[str, ...]) -> tuple[str, ...]:
    """The passages with one among them that has nothing to do with the questions."""
    other = rng.choice(python_docs.paragraphs(split)).split(". ")[0].rstrip(".") + "."
    at = rng.randrange(len(passages) + 1)
    return (*passages[:at], other, *passages[at:])


def document(rng: Random, split: Split, difficulty: float) -> Document:
    """Passages with many questions, as a conversation or as plain lines."""
    names = Names(rng, split)
    most = 2 + round(8 * difficulty)
    known = knowledge(rng, names, rng.randint(1, most), difficulty)
    count = min(14, len(known.facts) * rng.randint(1, 2) + 1)
    turns = ask(rng, names, known, count, unknown=0.09 * min(1.0, 2 * difficulty))
    passages: tuple[str, ...] = known.passages
    if rng.random() < 0.15 * difficulty:
        passages = _beside_other_text(rng, split, passages)
    shown = context(rng, passages)
    if rng.random() < 0.5:
        return listing(shown, turns, rng.choice((("Q", "A"), ("Question", "Answer"))))
    system = rng.choice(SYSTEMS) if rng.random() < 0.6 else None
    if system and rng.random() < 0.25:
        return chat(turns, f"{system}\n\n{shown}")
    return chat([first_question(rng, shown, turns[0]), *turns[1:]], system)
