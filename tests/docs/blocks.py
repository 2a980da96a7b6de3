"""The code blocks of a page, in order, each with the output that is shown right below it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "tutorial.md",
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One block that a reader would run; `shown` is None where the page shows no output."""

    page: Path
    line: int
    language: str
    code: str
    shown: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    made = []
    for at, block in enumerate(found):
        if block[1] not in ("sh", "python"):
            continue
        after = found[at + 1] if at + 1 < len(found) else None
        below = after is not None and text[block.end() : after.start()].strip() == ""
        is_output = below and after is not None and after[1] in ("json", "")
        made.append(
            Block(
                page,
                text.count("\n", 0, block.start()) + 1,
                block[1],
                block[2],
                after[2] if is_output and after is not None else None,
            )
        )
    return made


def said(text: str) -> list[str]:
    """Lines to compare: JSON by what it means, in any order where requests ran at once."""
    lines = [" ".join(line.split()) for line in _apart(text).splitlines() if line.strip()]
    try:
        return sorted(json.dumps(json.loads(line), sort_keys=True) for line in lines)
    except ValueError:
        return lines


def _apart(text: str) -> str:
    """curl ends its output with no newline, so replies can stand in one line."""
    return text.replace("}{", "}\n{")
