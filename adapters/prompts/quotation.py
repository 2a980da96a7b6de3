"""Passages in a prompt, as quotations and nothing else: the text that serving and training share.

    Passages:
    [1] the first passage, whose further lines
        stand further in
    [2] the second

    Question: what the user asked

No line of a passage begins where `[2]` or `Question:` could stand, so it cannot close its block.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

HEAD = "Passages:\n"
LEAD = "\n\nQuestion: "
INDENT = "\n    "
# For a chat that has no system message of its own.
SYSTEM = "Use only the given passages. If they do not contain the answer, say that you do not know."
# Characters that turn around what others look like: they have no place in a quotation.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def block(texts: Sequence[str]) -> str:
    """The text that quotes passages, without a line break at its end; nothing for none."""
    if not texts:
        return ""
    return HEAD + "\n".join(f"[{i}] {quoted(text)}" for i, text in enumerate(texts, 1))


def asked(shown: str, question: str) -> str:
    """The user's turn: the block first, the question last."""
    return f"{shown}{LEAD}{question}" if shown else question


def quoted(text: str) -> str:
    """A passage's text with every further line set in: none begins at the margin."""
    lines = (_plain(line).strip() for line in text.splitlines())
    return INDENT.join(line for line in lines if line)


def _plain(line: str) -> str:
    return "".join(
        " " if c == "\t" else c
        for c in line
        if c == "\t" or (unicodedata.category(c) != "Cc" and c not in _BIDI and not _is_tag(c))
    )


def _is_tag(character: str) -> bool:
    """Invisible twins of ASCII, which tokenizers read and people do not."""
    return 0xE0000 <= ord(character) <= 0xE007F
