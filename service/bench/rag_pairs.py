"""The second question on the same passages: what the prefix cache makes of it, on a server.

Each pair has documents of its own, so the first question finds nothing computed. Both questions of
a pair search the same few documents and get all of them; the time is that of the whole request for
one token, search included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any

from service.bench.rag_evaluation import Item, people
from service.client import Client, ServerRefused

if TYPE_CHECKING:
    from rich.progress import Progress

COLLECTION = "bench-pairs"
DOCUMENTS = 6  # of a pair: as many passages
PEOPLE = 5  # of a document; about 170 tokens of the embedded base
WHOLE = 1024  # tokens of a passage: a document is one, whatever the base's tokenizer


def measure(client: Client, pairs: int, progress: Progress) -> dict[str, Any]:
    """Medians over the pairs. Raises what the client does."""
    everybody = people(pairs * DOCUMENTS * PEOPLE, "train")
    groups = [everybody[at : at + PEOPLE] for at in range(0, len(everybody), PEOPLE)]
    with suppress(ServerRefused):
        client.remove_documents(COLLECTION)  # of a run that was stopped
    client.create_collection(
        {"name": COLLECTION, "description": "of nibble rag bench", "chunk_tokens": WHOLE}
    )
    bar = progress.add_task("pairs of questions", total=pairs)
    first: list[Mapping[str, float]] = []
    second: list[Mapping[str, float]] = []
    try:
        documents = [
            {"id": f"d{number:05d}", "text": " ".join(one.text for one in group)}
            for number, group in enumerate(groups)
        ]
        client.add_documents(COLLECTION, documents)
        # Loads what a first question loads; a document that begins no prompt of the pairs.
        _ask(client, groups[-1][0], [str(documents[-1]["id"])])
        for pair in range(pairs):
            places = range(pair * DOCUMENTS, (pair + 1) * DOCUMENTS)
            names = [str(documents[place]["id"]) for place in places]
            first.append(_ask(client, groups[places[1]][1], names))
            second.append(_ask(client, groups[places[-1]][3], names))
            progress.advance(bar)
    finally:
        client.remove_documents(COLLECTION)
    ratios = [one["seconds"] / two["seconds"] for one, two in zip(first, second, strict=True)]
    return {
        "pairs": pairs,
        "prompt_tokens": median(one["prompt_tokens"] for one in first),
        "first": _medians(first),
        "second": _medians(second),
        "ratio": round(median(ratios), 2),
        "least_cached": round(min(one["cached"] for one in second), 4),
    }


def pair_rows(found: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[object]]]:
    """What was found, as a table."""
    columns = ("question", "prompt tokens", "first token", "of it search", "from the cache")
    rows: list[Sequence[object]] = [
        (
            f"{name} of {found['pairs']} pairs",
            found["prompt_tokens"],
            f"{1e3 * found[name]['seconds']:.0f} ms",
            f"{1e3 * found[name]['search']:.0f} ms",
            f"{found[name]['cached']:.0%}",
        )
        for name in ("first", "second")
    ]
    return columns, [*rows, ("ratio", "", found["ratio"], "", "")]


def _ask(client: Client, item: Item, documents: Sequence[str]) -> dict[str, float]:
    retrieval = {
        "collection": COLLECTION,
        "k": DOCUMENTS,
        "mode": "dense",
        "filter": {"document": {"in": list(documents)}},
    }
    messages = [{"role": "user", "content": item.question}]
    started = time.perf_counter()
    reply = client.generate(messages, {"max_new_tokens": 1, "details": True}, retrieval)
    seconds = time.perf_counter() - started
    details = reply["details"]
    return {
        "seconds": seconds,
        "search": details["retrieval"]["timings"]["total"],
        "prompt_tokens": details["prompt_tokens"],
        "cached": details["cached_tokens"] / details["prompt_tokens"],
    }


def _medians(of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: round(median(one[name] for one in of), 6) for name in ("seconds", "search", "cached")
    }
