"""What was said against what was right: one score for each answer.

ROUGE-L is Lin's ("ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3: F with
as much weight on recall as on precision, which is what packages report). It is our own: the
package `rouge-score` drops every letter that is not Latin, so it gives 0 to any Korean answer.
chrF is sacrebleu's (Popović 2015).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\w+")


def exact(said: str, wanted: str) -> float:
    """The same, leading and trailing blanks aside."""
    return float(said.strip() == wanted.strip())


def rouge_l(said: str, wanted: str) -> float:
    """F of the longest common subsequence of words, in lower case: 0 to 1."""
    a, b = (_WORD.findall(text.lower()) for text in (said, wanted))
    common = _longest_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else float(a == b)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in a row of memory."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def chrf(said: Sequence[str], wanted: Sequence[str]) -> tuple[float, list[float]]:
    """Of the whole set, and of each answer: 0 to 1."""
    from sacrebleu.metrics.chrf import CHRF  # a third of a second

    metric = CHRF()
    whole = metric.corpus_score(list(said), [list(wanted)]).score / 100
    each = [metric.sentence_score(s, [w]).score / 100 for s, w in zip(said, wanted, strict=True)]
    return whole, each


def parsed(text: str) -> Any:
    """The JSON in `text`; raises ValueError. NaN and Infinity are none."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_json(text: str) -> bool:
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def field_match(said: str, wanted: str) -> float:
    """F of the fields that are right: a field is its path and its value. 0 where `said` is no JSON.

    A list's places are part of the path; a missing field and an invented one both cost.
    """
    try:
        got, right = Counter(fields(parsed(said))), Counter(fields(parsed(wanted)))
    except ValueError:
        return 0.0
    total = got.total() + right.total()
    return 2 * (got & right).total() / total if total else 1.0


def fields(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, value as JSON) of every leaf; what is empty is a leaf too."""
    if isinstance(value, Mapping) and value:
        inner = [(f"{path}.{key}", each) for key, each in value.items()]
    elif isinstance(value, list) and value:
        inner = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        return [(path, json.dumps(value, ensure_ascii=False, sort_keys=True))]
    return [leaf for where, each in inner for leaf in fields(each, where)]


def accuracy_and_f1(said: Sequence[str], wanted: Sequence[str]) -> tuple[float, float]:
    """Accuracy, and the mean of each label's F1 whatever its share (macro-F1).

    A label that is said but never wanted counts too, with 0.
    """
    right = sum(s == w for s, w in zip(said, wanted, strict=True))
    scores = []
    for label in sorted({*said, *wanted}):
        both = sum(s == label == w for s, w in zip(said, wanted, strict=True))
        some = sum(s == label for s in said) + sum(w == label for w in wanted)
        scores.append(2 * both / some)
    return right / len(wanted), sum(scores) / len(scores)
