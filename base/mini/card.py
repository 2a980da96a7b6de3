"""The model card of mini, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from base.mini.dialogue import TEXT

_HEAD = """---
license: apache-2.0
language: [en, ko]
library_name: transformers
pipeline_tag: text-generation
---
# mini

The embedded base model of Nibble: {parameters:,} parameters in Qwen3's shape (4 layers, hidden 256,
intermediate 768, 8 query and 4 key-value heads of 32, biases on the attention projections, tied
embeddings, {positions} positions, trained up to 1,024), a byte-level BPE of {vocabulary:,} tokens,
ChatML with system, user and assistant. It exists so that adapters of every kind can be tried
without a model hub. It answers short questions from short passages and does small tasks; it knows
nothing about the world and holds no conversation.

A token carries the space *after* a word, not before it, so a name is the same tokens in a passage
and at the start of an answer. Weights are stored in bfloat16 and were measured as stored.

## Reached on held-out data

Exact match of the greedy answer, end mark included. Names of people, places and rivers in these
items occur nowhere in the training text (split by hash); other tasks are new by combination, but
for small tables (sums and products of small numbers, Korean words, colours in upper case, small
talk), which a model may simply have learnt by heart. Items of other seeds were watched while the
recipe was shaped; these were not. Wording is the training's own.

fp32: the stored weights, computed in fp32. NF4: all decoder linears through bitsandbytes' NF4
(blocks of 64) and back, computed in fp32.
"""

_TAIL = """
## How it was made

`nibble base build mini` makes the text, the tokenizer and the weights from a seed: {steps:,}
steps, {tokens:,} tokens, {minutes:.0f} minutes, seed {seed}, {dtype} products with fp32 weights,
AdamW, rate {rate} with warm-up and linear decay to zero. The curriculum:
repeated random tokens until copying has formed, then short contexts with few names and many
questions each, widened step by step up to rows of 1,024 tokens.
Answers have weight 1, running text {text_weight}, prompts 0.

{schedule}

Trained on: {training_machine}.

Measured with `nibble base evaluate mini` on: {machine}.

## Data and licence

The text is made by the program in `base/mini` (stories, facts, tables, instruction tasks, simple
Korean about invented people), plus Python's own documentation and standard-library docstrings
(Python Software Foundation licence). Nothing else was used. The weights are under the licence of
this repository, Apache-2.0.

## Limits

Short answers only; passages of up to about ten short facts, worded as in the training; arithmetic
with one or two digits. Not for any use where a wrong answer matters.
"""


def _row(name: str, result: dict[str, Any], group: str, form: str) -> str:
    fp32, nf4 = (result[kind][group][name] for kind in ("fp32", "nf4"))
    return f"| {name} | {fp32:{form}} | {nf4:{form}} |"


def _table(title: str, result: dict[str, Any], group: str, form: str) -> str:
    rows = [_row(name, result, group, form) for name in result["fp32"][group]]
    return "\n".join([f"| {title} | fp32 | NF4 |", "|---|---|---|", *rows])


def _words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def render(evaluation: dict[str, Any], training: dict[str, Any], config: dict[str, Any]) -> str:
    """The card's Markdown from evaluation.json, training.json and config.json."""
    items = _words(evaluation["items"])
    timed = training["minutes"] is not None
    schedule = (
        "This run's schedule followed the clock (a budget of minutes), so it repeats in kind, "
        "not bit for bit; with steps only, a run is a function of its seed on one machine."
        if timed
        else "The schedule followed the steps: on one machine the run is a function of its seed."
    )
    if remark := training.get("remark"):
        schedule = f"{schedule} {remark}"
    head = _HEAD.format(
        parameters=evaluation["parameters"],
        positions=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
    )
    tail = _TAIL.format(
        steps=training["steps"],
        tokens=training["tokens"],
        minutes=training["seconds"] / 60,
        seed=training["seed"],
        dtype=training["dtype"],
        text_weight=TEXT,
        rate=training["rate"],
        schedule=schedule,
        training_machine=_words(training["environment"]),
        machine=_words(evaluation["environment"]),
    )
    tables = (
        _table("answers from context", evaluation, "context", ".1%"),
        _table("instruction task", evaluation, "tasks", ".1%"),
        _table("loss (nats per token)", evaluation, "loss", ".3f"),
    )
    return "\n".join([head, f"Items: {items}.", "", "\n\n".join(tables), tail])


def write(directory: Path) -> Path:
    """Write `README.md` beside the weights."""
    evaluation, training, config = (
        json.loads((directory / name).read_text(encoding="utf-8"))
        for name in ("evaluation.json", "training.json", "config.json")
    )
    card = directory / "README.md"
    card.write_text(render(evaluation, training, config), encoding="utf-8")
    return card
