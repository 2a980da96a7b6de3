"""BM25: which passages share the rarest words with a question.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), equation
3.15, with the idf of Lucene, which is never negative. Forty lines, so no library is needed: those
that are kept well bring SciPy or a search server.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")
_HANGUL = re.compile(r"[\uac00-\ud7a3]+")


def terms(text: str) -> list[str]:
    """Words in lower case; of Korean, whose endings vary, the syllables and their pairs too."""
    found: list[str] = _WORD.findall(text.lower())
    for run in _HANGUL.findall(text):
        found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
    return found


class Bm25:
    """An index over passages; `top` is deterministic, the earlier of equals first."""

    def __init__(self, passages: Sequence[str]) -> None:
        counts = [Counter(terms(passage)) for passage in passages]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            norm = K1 * (1 - B + B * length / mean)
            for term, times in count.items():
                self._postings[term].append((index, times * (K1 + 1) / (times + norm)))
        self._size = len(passages)

    def top(self, query: str, count: int) -> list[int]:
        """Numbers of the best `count` passages, best first; fewer where fewer share a word."""
        scores: dict[int, float] = defaultdict(float)
        for term in set(terms(query)):
            postings = self._postings.get(term, [])
            idf = math.log(1 + (self._size - len(postings) + 0.5) / (len(postings) + 0.5))
            for index, weight in postings:
                scores[index] += idf * weight
        return sorted(scores, key=lambda index: (-scores[index], index))[:count]
