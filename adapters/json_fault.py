"""What keeps a text from being JSON, in words that say what to write instead."""

from __future__ import annotations

import json


def fault(error: json.JSONDecodeError) -> str:
    """Where it ends being JSON, and why."""
    if not error.doc.strip():
        return "it is empty"
    return f"line {error.lineno}, column {error.colno}: {slip(error)}"


def slip(error: json.JSONDecodeError) -> str:
    """The slip of a pen that it looks like; Python's words where it looks like none. Quotes no
    word of the text."""
    text, at = error.doc, error.pos
    here, rest = text[at : at + 1], text[at + 1 :].lstrip()
    if here in ("}", "]") and text[:at].rstrip()[-1:] == ",":
        return f"a comma before {here!r}, where the last value has none after it"
    if here == "," and rest[:1] in ("}", "]"):  # Python 3.13 points at the comma
        return f"a comma before {rest[0]!r}, where the last value has none after it"
    if here == "," and error.msg == "Extra data" and not rest:
        return "a comma behind the value, where nothing may follow"
    if here == "'":
        return "names and texts stand in double quotes, not in single ones"
    if text[:1] == "\ufeff":
        return "a byte order mark before it: save it as UTF-8 without one"
    return "it ends too early" if at >= len(text.rstrip()) else error.msg
