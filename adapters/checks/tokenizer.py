"""An adapter's own tokenizer.json: may a stranger's tokenizer read prompts for this base?

It must know every token of the base's by the same id, and give no id beyond the adapter's rows.
"""

from __future__ import annotations

import json
from typing import Any

from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.vocabulary import PARTS, Tokens, parts_of

WHERE = "tokenizer"
HOW = (
    "send the tokenizer that goes with it: tokenizer.json as the form's part 'tokenizer' "
    "(`nibble adapters push` takes it from the adapter's directory)"
)
MAX_PADDING = 511  # rows without a token: what pad_to_multiple_of makes of the usual multiples
_TRIAL = "Nibble 0, a\n"


def check_tokenizer(tokens: Tokens | None, rows: int, own_rows: int, limits: Limits) -> bool:
    """Whether the upload's tokenizer says more than the base's. Raises InvalidAdapter, TooLarge.

    rows      of the adapter's tables
    own_rows  of the base's: where they differ, the vocabulary was resized
    """
    if tokens is None or tokens.own is None:
        _check_without(tokens, rows, own_rows)
        return False
    if len(tokens.own) > limits.max_tokenizer_bytes:
        raise TooLarge(f"{len(tokens.own)} bytes, limit {limits.max_tokenizer_bytes}", WHERE)
    found = read_tokenizer(tokens.own)
    vocabulary: dict[str, int] = found.get_vocab(with_added_tokens=True)
    _check_prefix(vocabulary, tokens)
    if len(vocabulary) == len(tokens.base):
        _check_without(tokens, rows, own_rows)
        return False
    _check_ids(vocabulary, tokens, rows, own_rows)
    _check_parts(found, tokens)
    return True


def read_tokenizer(raw: bytes) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads. Raises InvalidAdapter."""
    from tokenizers import Tokenizer  # only where there is one to read

    try:
        found = Tokenizer.from_buffer(raw)
    except Exception as error:  # the library has one kind of error for everything
        reason = str(error)[:200]
        raise InvalidAdapter(
            f"is no tokenizer.json of the tokenizers library: {reason}", WHERE
        ) from error
    found.no_truncation()
    found.no_padding()
    return found


def _check_without(tokens: Tokens | None, rows: int, own_rows: int) -> None:
    if rows > own_rows:
        raise InvalidAdapter(
            f"is missing: the vocabulary was resized from {own_rows} to {rows} rows, and this "
            f"base's tokenizer knows none of the new tokens; {HOW}",
            WHERE,
        )
    if tokens is not None and rows < min(tokens.count, own_rows):
        raise InvalidAdapter(
            f"the vocabulary was cut to {rows} rows, and this base's tokenizer has {tokens.count} "
            "tokens: a prompt could hold one that has no row",
            WHERE,
        )


def _check_prefix(vocabulary: dict[str, int], tokens: Tokens) -> None:
    for text, ident in tokens.base.items():
        if vocabulary.get(text) != ident:
            found = vocabulary.get(text)
            what = "is missing" if found is None else f"has id {found}"
            raise InvalidAdapter(
                f"{text[:80]!r} {what}, and has id {ident} in this base's tokenizer: every token "
                "of the base must mean the same, new ones come after them",
                WHERE,
            )


def _check_ids(vocabulary: dict[str, int], tokens: Tokens, rows: int, own_rows: int) -> None:
    text, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= rows:
        raise InvalidAdapter(
            f"{text[:80]!r} has id {last}, and the adapter's tables have {rows} rows, so ids go "
            f"to {rows - 1}",
            WHERE,
        )
    taken = set(tokens.base.values())
    shared = next((t for t, i in vocabulary.items() if t not in tokens.base and i in taken), None)
    if shared is not None:
        raise InvalidAdapter(
            f"{shared[:80]!r} has id {vocabulary[shared]}, which is another token of the base's",
            WHERE,
        )
    named = max(last + 1, own_rows)
    if rows - named > MAX_PADDING:
        raise InvalidAdapter(
            f"its ids end at {last}, and the adapter's tables have {rows} rows: {rows - named} new "
            f"rows have no token, and padding explains at most {MAX_PADDING}",
            WHERE,
        )


def _check_parts(found: Any, tokens: Tokens) -> None:
    """No regular expression of a stranger's runs over prompts, and no id that has no row."""
    own = parts_of(found)
    for name in PARTS:
        part = own[name]
        if part != tokens.parts.get(name) and _has_pattern(part):
            raise InvalidAdapter(
                f"its {name} has a regular expression that the base's has not: only the base's "
                "own is run; add tokens to the base's tokenizer (add_tokens) and save that",
                WHERE,
            )
    count = found.get_vocab_size(with_added_tokens=True)
    known = set(found.get_vocab(with_added_tokens=True).values())
    wrong = next((i for i in found.encode(_TRIAL).ids if i not in known), None)
    if wrong is not None:
        raise InvalidAdapter(
            f"it puts id {wrong} around a text, which is none of its {count} tokens (its "
            "post_processor)",
            WHERE,
        )


def _has_pattern(part: str | None) -> bool:
    def within(value: Any) -> bool:
        if isinstance(value, dict):
            return "Regex" in value or any(map(within, value.values()))
        return isinstance(value, list) and any(map(within, value))

    return part is not None and within(json.loads(part))
