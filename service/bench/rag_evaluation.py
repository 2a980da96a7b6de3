"""Answers from documents, measured on a running server, and how well passages are found.

Two tasks, both from what is in this repository or in Python itself:

- *people*: 200 documents about invented people whose names no training of the embedded base ever
  saw, and a question about each. Exact match of greedy answers: without passages, with the one
  right document (`gold`), and with what each mode finds among all of them.
- *python*: the sections of Python's language reference, as `pydoc_data` has them. A section's own
  heading is the question, its text without the heading the document to find. No language model.

Rankings are measured by `ir_measures`: Recall@5, MRR@10, nDCG@10. Two ways of asking the same
questions are compared pair by pair: answers by McNemar's exact test, nDCG by a permutation test.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from adapters.prompts.quotation import SYSTEM, asked, block
from base.mini import words
from base.mini.facts import PERSON, Relation
from base.mini.names import Split, pool
from service.client import Client
from service.retrieval.errors import installed

if TYPE_CHECKING:
    from rich.progress import Progress

Row = Sequence[object]
MODES = ("dense", "lexical", "hybrid")
NONE = "without passages"
PASSAGES = 3  # in the prompt
DEPTH = 50  # passages of a search, for the ranking of documents
FACTS = 4  # about each person
BATCH = 32
SWAPS = 10_000  # of the permutation test
SEED = 20
GROUP = 100  # people among whom a lesson finds its other passages
VALUES: Mapping[str, Sequence[str]] = {
    "job": words.JOBS,
    "food": words.FOODS,
    "animal": words.ANIMALS,
    "colour": words.COLOURS,
    "instrument": words.INSTRUMENTS,
    "subject": words.SUBJECTS,
    "vehicle": words.VEHICLES,
    "object": words.OBJECTS,
}


@dataclass(frozen=True, slots=True)
class Item:
    """A document, the question that it answers, and the answer, where there is one word for it."""

    document: str
    text: str
    question: str
    answer: str = ""


def people(count: int, part: Split = "held_out", seed: int = SEED) -> list[Item]:
    """Documents about people of a part of the names, one question on each."""
    rng = Random(seed)
    places = pool("place", part)
    items = []
    for name in rng.sample(pool("person", part), count):
        kinds = [relation for relation in PERSON if relation.values in (*VALUES, "place")]
        chosen = rng.sample(kinds, FACTS)
        values = [rng.choice(VALUES.get(relation.values, places)) for relation in chosen]
        told = [
            _said(rng, relation, name, value)
            for relation, value in zip(chosen, values, strict=True)
        ]
        asked = rng.randrange(FACTS)
        question = rng.choice(chosen[asked].asked).format(n=name)
        items.append(Item(name, " ".join(told), question, values[asked]))
    return items


def lessons(count: int) -> Iterator[dict[str, Any]]:
    """Rows to train an adapter that reads passages: other people, the prompt that is served.

    Beside the right document stand two that tell the same kind of thing of somebody else, as a
    search finds them. No name or place of the evaluation is among them.
    """
    made = 0
    for seed in itertools.count(SEED + 1):
        items = people(GROUP, "train", seed)
        rng = Random(seed)
        for item in items:
            others = _alike(item, items, rng)
            shown = sorted((item, *others), key=lambda one: one.document)
            text = asked(block([one.text for one in shown]), item.question)
            yield {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": item.answer},
                ]
            }
            made += 1
            if made == count:
                return


def _alike(item: Item, items: Sequence[Item], rng: Random) -> list[Item]:
    """The others that share the most words with the question, one of them drawn from the next."""
    words_of = set(item.question.split())
    rest = [one for one in items if one is not item]
    rng.shuffle(rest)
    rest.sort(key=lambda one: -len(words_of & set(one.text.split())))
    return [rest[0], rng.choice(rest[1 : PASSAGES + 5])][: PASSAGES - 1]


def _said(rng: Random, relation: Relation, name: str, value: str) -> str:
    sentence = rng.choice(relation.told).format(n=name, v=value)
    return sentence[0].upper() + sentence[1:]


_HEADING = re.compile(r"(?m)^(.{3,80})\n([*=~^-])\2{2,}[ \t]*$")


def sections(count: int) -> list[Item]:
    """Sections of Python's reference that have a heading of their own, and some text."""
    from pydoc_data.topics import topics

    items: dict[str, Item] = {}
    for topic in sorted(topics):
        text = topics[topic]
        found = list(_HEADING.finditer(text))
        for place, heading in enumerate(found):
            end = found[place + 1].start() if place + 1 < len(found) else len(text)
            body, title = text[heading.end() : end].strip(), heading[1].strip()
            if len(body) > 100 and title not in items:
                items[title] = Item(f"{topic}#{place}", body, title)
    chosen = list(items.values())
    return Random(SEED).sample(chosen, min(count, len(chosen)))


def evaluate(
    client: Client, progress: Progress, questions: int, topics: int, adapter: str | None
) -> dict[str, Any]:
    """Both tasks, in collections that are gone afterwards. Raises what the client does."""
    found: dict[str, Any] = {}
    with _filled(client, "evaluation-people", people(questions), progress) as task:
        found["people"] = {"found": _rankings(client, task, progress)}
        found["people"]["answered"] = _answers(client, task, adapter, progress)
    if topics:
        with _filled(client, "evaluation-python", sections(topics), progress) as task:
            found["python"] = {"found": _rankings(client, task, progress)}
    return found


class _filled:
    """A collection with the documents of some items, for the time of a block."""

    def __init__(
        self, client: Client, name: str, items: Sequence[Item], progress: Progress
    ) -> None:
        self.name = name
        self.items = items
        self._client = client
        self._progress = progress

    def __enter__(self) -> _filled:
        if any(one["name"] == self.name for one in self._client.collections()["collections"]):
            self._client.remove_documents(self.name)  # of a run that was stopped
        self._client.create_collection({"name": self.name, "description": "of nibble rag evaluate"})
        task = self._progress.add_task(f"{self.name}: documents", total=len(self.items))
        for start in range(0, len(self.items), BATCH):
            some = self.items[start : start + BATCH]
            documents = [{"id": item.document, "text": item.text} for item in some]
            self._client.add_documents(self.name, documents)
            self._progress.advance(task, len(some))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.remove_documents(self.name)


def _rankings(client: Client, task: _filled, progress: Progress) -> dict[str, Any]:
    """How well each mode finds the right document, and the pairs of modes compared."""
    bar = progress.add_task(f"{task.name}: search", total=len(task.items) * len(MODES))
    per_mode: dict[str, dict[str, list[float]]] = {}
    for mode in MODES:
        run: dict[str, dict[str, float]] = {}
        for number, item in enumerate(task.items):
            body = {"query": item.question, "k": DEPTH, "mode": mode}
            passages = client.search(task.name, body)["passages"]
            run[f"q{number}"] = _documents(passages)
            progress.advance(bar)
        per_mode[mode] = _measured(task.items, run)
    shown = {
        mode: {name: _mean(values) for name, values in of.items()} for mode, of in per_mode.items()
    }
    pairs = {
        f"{one} - {other}": _permuted(per_mode[one]["nDCG@10"], per_mode[other]["nDCG@10"])
        for one, other in (("hybrid", "dense"), ("hybrid", "lexical"), ("dense", "lexical"))
    }
    return {"questions": len(task.items), "modes": shown, "nDCG@10, p": pairs}


def _documents(passages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Documents by the rank of their best passage."""
    order = dict.fromkeys(str(passage["document"]) for passage in passages)
    return {document: 1.0 / rank for rank, document in enumerate(order, 1)}


def _measured(
    items: Sequence[Item], run: Mapping[str, Mapping[str, float]]
) -> dict[str, list[float]]:
    """Each measure's value for each question, in their order."""
    measures = installed("ir_measures")
    wanted = {
        measures.Recall @ 5: "Recall@5",
        measures.RR @ 10: "MRR@10",
        measures.nDCG @ 10: "nDCG@10",
    }
    right = {f"q{number}": {item.document: 1} for number, item in enumerate(items)}
    found = {name: [0.0] * len(items) for name in wanted.values()}
    for one in measures.iter_calc(list(wanted), right, {q: dict(r) for q, r in run.items()}):
        found[wanted[one.measure]][int(one.query_id[1:])] = float(one.value)
    return found


def _answers(
    client: Client, task: _filled, adapter: str | None, progress: Progress
) -> dict[str, Any]:
    """Exact match of each way of asking, and what passages change, pair by pair."""
    plain = [NONE, "gold", *MODES]
    arms = plain + [f"{arm}, {adapter}" for arm in plain if adapter]
    bar = progress.add_task(f"{task.name}: answers", total=len(arms) * len(task.items))
    hits: dict[str, list[bool]] = {}
    seconds: dict[str, list[float]] = {}
    for arm in arms:
        hits[arm], seconds[arm] = [], []
        for item in task.items:
            text, took = _asked(client, task.name, item, arm, adapter)
            hits[arm].append(_plain(text) == _plain(item.answer))
            seconds[arm].append(took)
            progress.advance(bar)
    return {
        arm: {
            "exact match": _mean([float(hit) for hit in hits[arm]]),
            "retrieval seconds, median": sorted(seconds[arm])[len(seconds[arm]) // 2],
            "p against gold": None if arm == "gold" else mcnemar(hits[arm], hits["gold"]),
            "p against none": None if arm == NONE else mcnemar(hits[arm], hits[NONE]),
            "p against the same, no adapter": mcnemar(hits[arm], hits[arm.partition(",")[0]])
            if arm not in plain
            else None,
        }
        for arm in arms
    }


def _asked(
    client: Client, name: str, item: Item, arm: str, adapter: str | None
) -> tuple[str, float]:
    messages = [{"role": "user", "content": item.question}]
    parameters: dict[str, Any] = {"max_new_tokens": 24, "details": True}
    way, adapted, _ = arm.partition(",")
    if adapted:
        parameters["adapter_id"] = adapter
    if way == NONE:
        return str(client.generate(messages, parameters)["generated_text"]), 0.0
    retrieval: dict[str, Any] = {"collection": name, "k": PASSAGES, "mode": way}
    if way == "gold":
        retrieval |= {"mode": "dense", "k": 1, "filter": {"document": item.document}}
    reply = client.generate(messages, parameters, retrieval)
    seconds: float = reply["details"]["retrieval"]["timings"]["total"]
    return str(reply["generated_text"]), seconds


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: the questions that only one of two answered."""
    only = sum(a and not b for a, b in zip(one, other, strict=True))
    both = only + sum(b and not a for a, b in zip(one, other, strict=True))
    less = min(only, both - only)
    tail: float = sum(math.comb(both, k) for k in range(less + 1)) / 2**both
    return round(min(1.0, 2 * tail), 6)


def _permuted(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test on the mean of the differences."""
    import numpy as np

    differences = np.array(one) - np.array(other)
    signs = np.random.default_rng(SEED).choice((-1.0, 1.0), (SWAPS, len(differences)))
    swapped = np.abs(signs @ differences)
    reached = int((swapped >= abs(differences.sum()) - 1e-12).sum())
    return round((reached + 1) / (SWAPS + 1), 6)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def tables(found: Mapping[str, Any]) -> Iterator[tuple[Sequence[str], list[Row]]]:
    """What was found, as tables."""
    for name, title in (("people", "invented people"), ("python", "Python's reference")):
        if name not in found:
            continue
        of = found[name]["found"]
        columns = (f"{title}, {of['questions']} questions", "Recall@5", "MRR@10", "nDCG@10")
        yield columns, [(mode, *values.values()) for mode, values in of["modes"].items()]
        yield ("nDCG@10", "p"), list(of["nDCG@10, p"].items())
    yield (
        (
            "answers",
            "exact match",
            "p against none",
            "p against gold",
            "p against no adapter",
            "retrieval, median s",
        ),
        [
            (
                arm,
                of["exact match"],
                _or_dash(of["p against none"]),
                _or_dash(of["p against gold"]),
                _or_dash(of["p against the same, no adapter"]),
                of["retrieval seconds, median"],
            )
            for arm, of in found["people"]["answered"].items()
        ],
    )


def _or_dash(value: float | None) -> object:
    return "–" if value is None else value
