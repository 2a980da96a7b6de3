"""One system on a set of questions: every metric that fits them, item by item, with intervals.

The likelihood pass comes first, and says which right answers greedy decoding says to the letter;
only the others are generated, so a good adapter is measured at the price of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np

from adapters.intervals import rate
from base.load import Base
from training.data import Example, encode
from training.evaluate import generate
from training.evaluation import texts
from training.evaluation.likelihood import choose, likelihoods
from training.evaluation.significance import (
    Estimate,
    Paired,
    bootstrap,
    corpus_interval,
    mcnemar,
    paired_bootstrap,
    ratio,
)
from training.methods import Attached

Metric = Literal["perplexity", "exact_match", "labels", "json", "rouge_l", "chrf"]
METRICS: tuple[Metric, ...] = ("perplexity", "exact_match", "labels", "json", "rouge_l", "chrf")
MOST_LABELS = 20  # different answers: more are no labels
LONG = 4.0  # words: ROUGE and chrF say little of shorter answers
ALIKE = 500  # resamples of figures of a whole set, which are computed anew for each


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its right answer as tokens, and the answer as text; "" of a document."""

    example: Example
    answer: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one system: a figure with its interval for each name, and the items behind it."""

    figures: Mapping[str, Estimate]
    items: Mapping[str, Sequence[float]]  # only what can be compared item by item
    said: Sequence[str]  # "" of documents


def fitting(questions: Sequence[Question]) -> tuple[Metric, ...]:
    """The metrics that fit these answers."""
    answers = [question.answer for question in questions]
    if not all(answers):
        return ("perplexity",)
    found: list[Metric] = ["perplexity", "exact_match"]
    if len(set(answers)) <= min(MOST_LABELS, len(answers) // 2) and len(set(answers)) > 1:
        found.append("labels")
    if all(texts.is_json(answer) and answer[0] in "{[" for answer in answers):
        found.append("json")
    elif fmean(len(answer.split()) for answer in answers) >= LONG:
        found += ["rouge_l", "chrf"]
    return tuple(found)


def score(
    base: Base,
    questions: Sequence[Question],
    metrics: Sequence[Metric],
    *,
    adapter: Attached | None = None,
    choices: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> Scores:
    """`report` hears how many questions are done. `choices` are the labels; without them, all
    answers that occur. `max_new_tokens` is half as many again as the longest right answer has,
    unless it is given. Raises ValueError where an answer is none of `choices`."""
    found = likelihoods(
        base, [q.example for q in questions], adapter=adapter, batch_size=batch_size
    )
    said = [q.answer for q in questions]
    spoken = {"exact_match", "json", "rouge_l", "chrf"} & set(metrics)
    open_items = [i for i, one in enumerate(found) if spoken and not one.exact]
    report(len(questions) - len(open_items))
    if open_items:
        longest = max(q.example.loss_tokens for q in questions)
        prompts = [questions[i].example for i in open_items]
        generated = generate(
            base,
            [each.tokens[: each.answer_start] for each in prompts],
            max_new_tokens=max_new_tokens or longest + longest // 2 + 1,
            batch_size=batch_size,
            adapter=adapter,
            report=lambda done: report(len(questions) - len(open_items) + done),
        )
        for i, text in zip(open_items, generated, strict=True):
            said[i] = text
    figures: dict[str, Estimate] = {}
    items: dict[str, Sequence[float]] = {}
    if "perplexity" in metrics:
        nats, tokens = [one.nats for one in found], [one.tokens for one in found]
        figures["perplexity"] = _perplexity(ratio([nats], [tokens]))
        items["perplexity"] = [n / t for n, t in zip(nats, tokens, strict=True)]
    if "labels" in metrics:
        _labels(base, questions, choices, adapter, batch_size, figures, items)
    _of_texts(questions, said, metrics, figures, items)
    return Scores(figures, items, said if spoken else [])


def _perplexity(nats: Estimate) -> Estimate:
    return Estimate(*(float(np.exp(edge)) for edge in (nats.value, nats.low, nats.high)))


def _labels(
    base: Base,
    questions: Sequence[Question],
    choices: Sequence[str] | None,
    adapter: Attached | None,
    batch_size: int,
    figures: dict[str, Estimate],
    items: dict[str, Sequence[float]],
) -> None:
    """Accuracy and macro-F1 of the most likely label."""
    wanted = [question.answer for question in questions]
    labels = list(choices or sorted(set(wanted)))
    for answer in wanted:
        if answer not in labels:
            raise ValueError(f"the answer {answer!r} is none of the choices {labels}")
    eos = base.tokenizer.eos_token_id
    endings = [(*encode(base.tokenizer, label), eos) for label in labels]
    rows = [_ending(q.example, ending) for q in questions for ending in endings]
    found = iter(likelihoods(base, rows, adapter=adapter, batch_size=batch_size))
    picked = [labels[i] for i in choose([[next(found) for _ in labels] for _ in questions])]
    right = [float(p == w) for p, w in zip(picked, wanted, strict=True)]
    figures["accuracy"] = _rate(right)
    figures["macro_f1"] = corpus_interval(
        len(wanted),
        lambda draw: texts.accuracy_and_f1([picked[i] for i in draw], [wanted[i] for i in draw])[1],
        resamples=ALIKE,
    )
    items["accuracy"] = right


def _ending(example: Example, ending: Sequence[int]) -> Example:
    """The same prompt with another answer."""
    return replace(example, tokens=(*example.tokens[: example.answer_start], *ending))


def _of_texts(
    questions: Sequence[Question],
    said: Sequence[str],
    metrics: Sequence[Metric],
    figures: dict[str, Estimate],
    items: dict[str, Sequence[float]],
) -> None:
    wanted = [question.answer for question in questions]
    pairs = list(zip(said, wanted, strict=True))
    if "exact_match" in metrics:
        items["exact_match"] = [texts.exact(s, w) for s, w in pairs]
        figures["exact_match"] = _rate(items["exact_match"])
    if "json" in metrics:
        items["json_valid"] = [float(texts.is_json(s)) for s in said]
        items["field_match"] = [texts.field_match(s, w) for s, w in pairs]
        figures["json_valid"] = _rate(items["json_valid"])
        figures["field_match"] = bootstrap([items["field_match"]])
    if "rouge_l" in metrics:
        items["rouge_l"] = [texts.rouge_l(s, w) for s, w in pairs]
        figures["rouge_l"] = bootstrap([items["rouge_l"]])
    if "chrf" in metrics:
        whole, items["chrf"] = texts.chrf(said, wanted)
        spread = bootstrap([items["chrf"]])  # of the answers' mean, which is near the whole's
        shift = whole - spread.value
        figures["chrf"] = Estimate(whole, spread.low + shift, spread.high + shift)


def _rate(right: Sequence[float]) -> Estimate:
    """Wilson's interval."""
    found = rate(sum(right), len(right))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return Estimate(found.estimate, found.low, found.high)


def compare(scores: Scores, other: Scores) -> dict[str, Paired]:
    """`scores` less `other`, for each figure that both have of the same items.

    Right and wrong by McNemar's test, the rest by the paired bootstrap; perplexity in nats for each
    token, the items' mean.
    """
    found = {}
    for name in scores.items.keys() & other.items.keys():
        a, b = scores.items[name], other.items[name]
        if {*a, *b} <= {0.0, 1.0}:
            found[name] = mcnemar([bool(x) for x in a], [bool(x) for x in b])
        else:
            found[name] = paired_bootstrap(a, b)
    return found
