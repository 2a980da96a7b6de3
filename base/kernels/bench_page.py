"""What the bench of the kernels found, as a section of docs/PERFORMANCE.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADING = "## The kernels alone"


@dataclass(frozen=True)
class Row:
    """One kernel on one size and instruction set: its best time, and its share of the limit."""

    kernel: str
    size: str
    isa: str
    best: float  # seconds
    share: float


def section(rows: Sequence[Row], setting: str, command: str) -> str:
    """A table with a line for each kernel and size, and a column for each instruction set."""
    sets = list(dict.fromkeys(row.isa for row in rows))
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.size), {})[row.isa] = row
    cells = [
        [kernel, size, *(_cell(found.get(name)) for name in sets)]
        for (kernel, size), found in lines.items()
    ]
    return "\n\n".join(
        (
            HEADING,
            f"Written by `{command}`; change nothing here by hand. {setting} Microseconds of the "
            "best round, and which share of the machine's limit that is: the least time that its "
            "bytes or its multiply-adds can take, whichever is more, over the time that it took. "
            "Operands rotate through more memory than the caches hold, and instruction sets take "
            "turns; *fast* multiplies in 8 bits.",
            _table(["kernel", "size", *sets], cells),
        )
    )


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{1e6 * row.best:,.1f} ({100 * row.share:.0f} %)"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def section_of(page: str) -> str:
    """The section as it stands in a page; empty where there is none."""
    _, heading, rest = page.partition(f"{HEADING}\n")
    return f"{heading}{rest.partition(f'{chr(10)}## ')[0]}".strip()


def put(path: Path, text: str) -> None:
    """Write the section to a page: in place of the one that it has, else at its end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    old = section_of(page)
    parts = page.replace(old, text) if old else "\n\n".join(filter(None, (page.strip(), text)))
    path.write_text(parts.strip() + "\n", encoding="utf-8")
