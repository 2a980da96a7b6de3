"""A row as examples: token ids and which of them bear loss.

The prompt before an answer is exactly what serving renders, token for token, so a conversation of
n assistant turns gives n examples. The stop token after an answer bears loss too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import InvalidChat, InvalidTemplate
from adapters.prompts.filling import filled_chat, takes
from adapters.prompts.template import PromptTemplate
from adapters.prompts.variables import checked_values
from adapters.template import render_chat
from training.data.shape import Turn, turns
from training.data.source import Row
from training.errors import DataError

Loss = Literal["assistant", "completion", "all"]
TooLong = Literal["refuse", "cut"]


@dataclass(frozen=True, slots=True)
class Example:
    """`tokens[answer_start:]` bear loss; the last one is the stop token, but in a document's
    earlier pieces."""

    tokens: tuple[int, ...]
    answer_start: int

    @property
    def loss_tokens(self) -> int:
        return len(self.tokens) - self.answer_start


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples of one row."""

    examples: list[Example]
    cut: int = 0  # tokens of prompts that were taken off
    pieces: int = 0  # of a document that is longer than one example


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become examples.

    `loss`: on every assistant turn; on a conversation's last one, its completion; or on all tokens
    but the first, which nothing predicts. A document always bears loss on all of it.
    `too_long` "cut" takes off the beginning of a prompt; an answer is never cut, for the end of it
    is what teaches the model to stop. A document is split instead: each piece begins with the last
    token of the one before, so every token is learnt once.
    """

    tokenizer: Any
    max_length: int
    loss: Loss = "assistant"
    template: str | None = None  # jinja; without it the base's own
    too_long: TooLong = "refuse"
    prompt: PromptTemplate | None = None  # around every question; a row has its variables

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token: no example could end")

    def examples(self, place: str, row: Row) -> Encoded:
        """Raises DataError, with place and field, where nothing can be learnt from the row."""
        row, values = self.parted(row)
        found = turns(place, row)
        if found[0].asked is None:
            return self._document(place, found[0])
        if self.loss != "assistant":
            found = found[-1:]
        made = [self._example(place, turn, values) for turn in found]
        return Encoded([example for example, _ in made], sum(cut for _, cut in made))

    def parted(self, row: Row) -> tuple[Row, Row]:
        """The row itself, and the variables of the prompt template that stand in it."""
        if self.prompt is None or row.keys() & {"text"}:
            return row, {}
        names = {variable.name for variable in self.prompt.variables}
        values = {name: value for name, value in row.items() if name in names}
        rest = {name: value for name, value in row.items() if name not in names}
        if rest.keys() == {"completion"} and not takes(self.prompt, "input"):
            rest = {"prompt": "", **rest}  # the template asks by itself
        return rest, values

    def _example(self, place: str, turn: Turn, values: Row) -> tuple[Example, int]:
        """The example, and how many tokens of its prompt were cut off."""
        if not turn.answer:
            raise DataError(
                f"{place}: {turn.field}: an empty answer, so no token but the stop token bears loss"
            )
        prompt, said = self._prompt(place, turn, values), self._said(place, turn)
        over = len(prompt) + len(said) - self.max_length
        if over > 0:
            self._check_length(place, turn, len(prompt), len(said))
            prompt = prompt[over:]
        start = 1 if self.loss == "all" else len(prompt)
        return Example((*prompt, *said), start), max(0, over)

    def _check_length(self, place: str, turn: Turn, prompt: int, said: int) -> None:
        limit = f"data.max_length is {self.max_length}"
        if said >= self.max_length:
            raise DataError(f"{place}: {turn.field}: an answer of {said} tokens, {limit}")
        if self.too_long == "refuse":
            raise DataError(
                f"{place}: {turn.field}: {prompt + said} tokens with its prompt, {limit}; "
                "data.too_long=cut takes off the beginning of the prompt"
            )

    def _document(self, place: str, turn: Turn) -> Encoded:
        if not turn.answer.strip():
            raise DataError(f"{place}: {turn.field}: an empty text, so no token bears loss")
        empty = self.tokenizer.encode("")
        begin = [token for token in empty[:1] if token == self.tokenizer.bos_token_id]
        said = self._said(place, turn)
        tokens = (*begin, *(said if turn.ends else said[:-1]))
        if len(tokens) < 2:
            raise DataError(f"{place}: {turn.field}: one token alone, which nothing predicts")
        starts = range(0, len(tokens) - 1, self.max_length - 1)
        pieces = [Example(tokens[at : at + self.max_length], 1) for at in starts]
        return Encoded(pieces, pieces=len(pieces) if len(pieces) > 1 else 0)

    def _prompt(self, place: str, turn: Turn, values: Row) -> list[int]:
        asked = turn.asked or ()
        if self.prompt is None and isinstance(asked, str):
            ids: list[int] = self.tokenizer.encode(asked)
            return ids
        answer = ""
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        try:
            if self.prompt is not None:
                checked = checked_values(self.prompt.variables, values, "")
                given = [message for message in asked if message["content"]]
                filled, before = filled_chat(self.prompt, checked, given)
                asked, answer = filled.messages(before), filled.answer
            return render_chat(self.tokenizer, asked, self.template, answer=answer)
        except (InvalidChat, InvalidTemplate) as error:
            raise DataError(f"{place}: before {turn.field}: {error}") from None

    def _said(self, place: str, turn: Turn) -> list[int]:
        said = encode(self.tokenizer, turn.answer)
        control = set(said) & set(self.tokenizer.all_special_ids)
        if control:
            spelt = [self.tokenizer.decode([token]) for token in sorted(control)]
            raise DataError(
                f"{place}: {turn.field}: the answer spells {spelt}, which would be control tokens"
            )
        return [*said, self.tokenizer.eos_token_id]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what the model is to say."""
    # It would warn of a text longer than the model: which is cut into pieces afterwards.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def examples(
    rows: Iterable[tuple[str, Row]],
    tokenizer: Any,
    max_length: int,
    template: str | None = None,
) -> list[Example]:
    """All rows as examples. Raises DataError at the first row that nothing can be learnt from."""
    encoding = Encoding(tokenizer, max_length, template=template)
    found = [example for place, row in rows for example in encoding.examples(place, row).examples]
    if not found:
        raise DataError("no rows: at least one example is needed")
    return found
