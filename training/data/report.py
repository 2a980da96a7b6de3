"""Report: what was found in a file, for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from training.data.corpus import Corpus
from training.data.encoding import Encoded, Example
from training.errors import DataError

SHOWN = 20
_BAR = 30  # characters of the longest


@dataclass(slots=True)
class Report:
    """Counts are of rows where nothing else is said; the lists hold the first `shown` of them."""

    path: Path
    shown: int = SHOWN
    rows: int = 0
    bad: int = 0
    duplicates: int = 0
    left_out: int = 0  # of the duplicates
    held_out: int = 0  # by data.split
    also_in_train: int = 0  # of a file to evaluate on
    cut: int = 0
    cut_tokens: int = 0
    split: int = 0  # documents of more than one piece
    stops: int = 0  # examples that end with the stop token
    rejects: list[DataError] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)

    def reject(self, error: DataError) -> None:
        self.bad += 1
        if len(self.rejects) < self.shown:
            self.rejects.append(error)

    def note(self, place: str, encoded: Encoded) -> None:
        """Count what encoding the row at `place` took off or apart."""
        self.split += encoded.pieces > 0
        if encoded.cut:
            self.cut += 1
            self.cut_tokens += encoded.cut
            if len(self.cuts) < self.shown:
                self.cuts.append(f"{place}: {encoded.cut} tokens of the prompt cut off")

    def refuse_beyond(self, limit: int) -> None:
        """Raises DataError that names the first bad rows, where there are more than `limit`."""
        if self.bad <= limit:
            return
        lines = [str(error) for error in self.rejects]
        if self.bad > len(lines):
            lines.append(f"and {self.bad - len(lines):,} more")
        if self.bad > 1 or limit:
            lines.insert(0, f"{self.bad:,} bad rows, data.max_bad_rows is {limit}:")
        raise DataError("\n".join(lines))

    def summary(self) -> str:
        """In a few words, what the rows lost; "" where nothing."""
        counts = {
            "bad rows left out": self.bad,
            "prompts cut": self.cut,
            "duplicates left out": self.left_out,
            "duplicates kept": self.duplicates - self.left_out,
            "rows that are also in data.train": self.also_in_train,
        }
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)

    def counted(self, corpus: Corpus) -> dict[str, Any]:
        """The same for programs; `corpus` is what became of the rows."""
        counts = ("rows", "bad", "duplicates", "left_out", "held_out", "also_in_train", "cut")
        return {
            "path": str(self.path),
            **{name: getattr(self, name) for name in counts},
            "examples": len(corpus),
            "tokens": corpus.tokens,
            "loss_tokens": corpus.loss_tokens,
            "rejects": [str(error) for error in self.rejects],
        }

    def described(self, corpus: Corpus) -> RenderableType:
        """`corpus` is what became of the rows."""
        table = Table(show_header=False, box=None, title=Text(str(self.path)), title_justify="left")
        table.add_row("rows", f"{self.rows:,}")
        table.add_row(
            "examples",
            f"{len(corpus):,}: {corpus.tokens:,} tokens, {corpus.loss_tokens:,} of them bear loss",
        )
        if corpus:
            table.add_row("lengths", _lengths(corpus))
        table.add_row("bad rows", f"{self.bad:,}")
        if self.cut:
            table.add_row("cut", f"{self.cut:,} rows, {self.cut_tokens:,} tokens of their prompts")
        if self.split:
            table.add_row("split", f"{self.split:,} documents, into pieces of data.max_length")
        if self.duplicates:
            kept = f"{self.left_out:,} left out" if self.left_out else "kept: data.deduplicate"
            table.add_row("duplicates", f"{self.duplicates:,} ({kept})")
        if self.held_out:
            table.add_row("held out", f"{self.held_out:,} rows or pieces of text, by data.split")
        if self.also_in_train:
            table.add_row("also in data.train", f"[red]{self.also_in_train:,} rows[/]")
        named = [str(error) for error in self.rejects] + self.cuts
        left = self.bad + self.cut - len(named)
        named += [f"and {left:,} more"] if left else []
        return Group(table, *_histogram(corpus), *(Text(line) for line in named))


def highlighted(example: Example, tokenizer: Any) -> Text:
    """The first example as the model reads it; what bears loss is marked."""
    text = Text("the first example; what bears loss is marked:\n")
    text.append(tokenizer.decode(example.tokens[: example.answer_start]), style="dim")
    text.append(tokenizer.decode(example.tokens[example.answer_start :]), style="bold reverse")
    return text


def _lengths(corpus: Corpus) -> str:
    lengths = sorted(map(corpus.length, range(len(corpus))))

    def at(share: float) -> int:
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    return f"{lengths[0]:,} to {lengths[-1]:,} tokens; median {at(0.5):,}, 95 % below {at(0.95):,}"


def _histogram(corpus: Corpus) -> list[Text]:
    """A line for each power of two."""
    counts: dict[int, int] = {}
    for index in range(len(corpus)):
        power = (corpus.length(index) - 1).bit_length()
        counts[power] = counts.get(power, 0) + 1
    most = max(counts.values(), default=1)
    return [
        Text(
            f"  up to {2**power:>7,} tokens {'█' * -(-_BAR * counts[power] // most)} "
            f"{counts[power]:,}"
        )
        for power in sorted(counts)
    ]
