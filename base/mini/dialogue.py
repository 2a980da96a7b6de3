"""A document of the corpus: pieces of text, each either read (weight 0) or to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ANSWER = 1.0
TEXT = 0.25  # running text is plentiful and its loss large: answers must not drown in it


@dataclass(frozen=True)
class Piece:
    """Text and the weight its tokens have in the loss."""

    text: str
    weight: float = 0.0


Document = tuple[Piece, ...]


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    user: str
    assistant: str


def chat(turns: Sequence[Turn], system: str | None = None) -> Document:
    """A conversation exactly as the chat template renders it; only answers have weight.

    The end mark of an answer belongs to the answer, so that the model learns to stop.
    """
    pieces: list[Piece] = []
    lead = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for turn in turns:
        question = f"{lead}<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n"
        pieces += [Piece(question), Piece(f"{turn.assistant}<|im_end|>", ANSWER)]
        lead = "\n"
    return tuple(pieces)


def listing(context: str, turns: Sequence[Turn], labels: tuple[str, str] = ("Q", "A")) -> Document:
    """The same questions as plain lines under their context: short, so many fit in a sequence."""
    pieces = [Piece(f"{context}\n" if context else "")]
    for turn in turns:
        pieces[-1] = Piece(f"{pieces[-1].text}{labels[0]}: {turn.user}\n{labels[1]}: ")
        pieces += [Piece(f"{turn.assistant}\n", ANSWER), Piece("")]
    return tuple(piece for piece in pieces if piece.text)


def running_text(text: str) -> Document:
    """A document all of which is to be learnt, lightly."""
    return (Piece(text, TEXT),)
