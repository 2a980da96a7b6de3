"""What the site's build adds to docs/: the README as its first page, the map, and the reference."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from service.reference import pages

ROOT = Path(__file__).resolve().parents[1]
# What has no page, as it lies outside docs/: its name stays, without a link.
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")

_PICTURE = re.compile(r"(!\[[^\]]*\]\()docs/")  # a picture of README, as it lies from docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {f"reference/{name}": text for name, text in pages().items()}
    made["index.md"] = _moved((ROOT / "README.md").read_text(encoding="utf-8"))
    made["architecture.md"] = _moved((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Links to what the site does not have become plain names."""
    here = Path(page.file.src_uri).parent  # type: ignore[attr-defined]

    def kept(found: re.Match[str]) -> str:
        where = (ROOT / "docs" / here / found[2]).resolve()
        path = str(where.relative_to(ROOT / "docs")) if where.is_relative_to(ROOT / "docs") else ""
        here_too = files.get_file_from_path(path)
        if path and not where.is_dir() and here_too and not here_too.inclusion.is_excluded():
            return found[0]
        return f"{found[1]} (`{where.relative_to(ROOT)}`)"

    return _LINK.sub(kept, markdown)


def _moved(text: str) -> str:
    """A page of the repository's root, as it reads inside of docs/."""

    def link(found: re.Match[str]) -> str:
        label, path, mark = found[1], found[2], found[3] or ""
        if path == "ARCHITECTURE.md":
            return f"[{label}](architecture.md{mark})"
        if path.startswith("docs/"):
            return f"[{label}]({path.removeprefix('docs/')}{mark})"
        return f"{label} (`{path}`)"

    return _LINK.sub(link, _PICTURE.sub(r"\1", text))
