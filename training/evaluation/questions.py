"""The rows of a file as questions, with or without a system prompt in front."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.prompts.template import PromptTemplate
from training.data import Encoding, Example, read_rows
from training.data.shape import Turn, chosen, turns
from training.errors import DataError
from training.evaluation.scorecard import Question
from training.evaluation.shots import Shots


def read_questions(
    path: Path,
    tokenizer: Any,
    *,
    max_length: int,
    template: str | None = None,
    columns: Mapping[Any, str] | None = None,
    system: str | None = None,
    limit: int | None = None,
    prompt: PromptTemplate | None = None,
    variables: Collection[str] = (),
    shots: Shots | None = None,
) -> list[Question]:
    """Every answer in the file, at most `limit`. Raises DataError, with place and field.

    `prompt` is a prompt template around every question; `variables` are fields of the rows that
    templates take, of this one or of those that it is compared with. `shots` stand before each
    question and are none themselves.
    """
    encoding = Encoding(tokenizer, max_length, template=template, prompt=prompt)
    known = {variable.name for variable in prompt.variables} if prompt else set()
    found: list[Question] = []
    for place, given in read_rows(path):
        rest = {name: value for name, value in given.items() if name not in variables}
        own = {name: given[name] for name in sorted(known & given.keys())}
        row = _with_system(own | chosen(rest, columns or {}), system)
        if shots is not None:
            row = shots.before(place, row)
        answers = turns(place, encoding.parted(row)[0])
        made = encoding.examples(place, row).examples
        shown = shots.answers if shots else 0
        found += _questions(answers[shown:], made[shown:])
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise DataError(f"{path}: no rows: at least one question is needed")
    return found


def _questions(answers: Sequence[Turn], made: Sequence[Example]) -> list[Question]:
    if answers[0].asked is None:  # a document, in as many pieces as its length needs
        return [Question(piece, "") for piece in made]
    pairs = zip(answers, made, strict=True)
    return [Question(example, turn.answer.strip()) for turn, example in pairs]


def _with_system(row: Mapping[str, Any], system: str | None) -> Mapping[str, Any]:
    """As the first message of a chat, or before a plain prompt; a document has no place for it."""
    if system is None or "text" in row:
        return row
    said = {"role": "system", "content": system}
    if isinstance(row.get("messages"), list):
        rest = [message for message in row["messages"] if message.get("role") != "system"]
        return {**row, "messages": [said, *rest]}
    if isinstance(row.get("conversations"), list):
        rest = [turn for turn in row["conversations"] if turn.get("from") != "system"]
        return {**row, "conversations": rest, "system": system}
    if isinstance(row.get("instruction"), str):
        return {**row, "system": system}
    if isinstance(row.get("prompt"), str):
        return {**row, "prompt": f"{system}\n\n{row['prompt']}"}
    return row
