"""Python's own documentation: the topics of `help()` and the docstrings of the standard library.

Both come with the interpreter (PSF licence). Docstrings are read from the source with `ast`, no
module is imported. One paragraph in twenty, by hash, is held out for evaluation.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from base.mini.names import Split

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own sources
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (found := ast.get_docstring(node)):
            yield found


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path


def _worth(paragraph: str) -> bool:
    """Prose of a useful length: few symbols, no drawings, only plain characters."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return 80 <= len(paragraph) <= 900 and letters > 0.8 * len(paragraph) and paragraph.isascii()


@cache
def vocabulary(split: Split) -> tuple[str, ...]:
    """The plain words of the documentation, each once."""
    found = dict.fromkeys(word for p in paragraphs(split) for word in p.split() if word.isalpha())
    return tuple(found)


@cache
def paragraphs(split: Split) -> tuple[str, ...]:
    """The documentation's paragraphs of one part of the split, each once, in a fixed order."""
    texts = [*(topics[key] for key in sorted(topics))]
    for path in _sources():
        texts += _docstrings(path)
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            plain = re.sub(r"\s+", " ", paragraph).strip()
            if _worth(plain):
                found[plain] = None
    wanted = split == "held_out"
    return tuple(p for p in found if (hashlib.sha256(p.encode()).digest()[0] < 13) == wanted)
