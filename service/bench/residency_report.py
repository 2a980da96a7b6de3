"""The figures of many registered adapters as Markdown, and their place in a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: nibble bench zipf -->", "<!-- end of figures -->"
KIB, MIB = 1 << 10, 1 << 20
Row = Mapping[str, Any]


def residency_markdown(figures: Mapping[str, Any]) -> str:
    """All tables, one after the other for each base."""
    machine, rows = figures["machine"], figures["rows"]
    first = rows[0]
    parts = [
        f"{machine['cpu']}, {first['threads']} threads; {first['requests']} requests a row, "
        f"{first['clients']} at a time, {first['prompt_tokens']} tokens in, "
        f"{first['new_tokens']} out; LoRAs of rank {first['rank']} on "
        f"{', '.join(first['modules'])}; memory for {first['resident']} of them."
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        parts += [f"### {model}", _traffic(mine), _cost(mine), _warm(mine)]
    return "\n\n".join(part for part in parts if part)


def check_markers(path: Path) -> None:
    """Raise ValueError where the document has no place for the tables."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} should have the lines {BEGIN} and {END}, once, in this order")


def put_between_markers(path: Path, markdown: str) -> None:
    """Replace what stands between the markers of the document."""
    check_markers(path)
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{markdown}\n\n{END}{after}", encoding="utf-8")


def _traffic(rows: Sequence[Row]) -> str:
    head = (
        "registered",
        "output tokens/s",
        "asked for",
        "hit rate",
        "slot / host / store",
        "cold load p50 / p99, ms",
        "first token p50 / p99, ms",
        "in slots, MiB",
        "RSS, MiB",
    )
    return _table(
        head,
        (
            (
                f"{row['registered']:,}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['distinct']}",
                f"{row['hit_rate']:.1%}",
                " / ".join(str(row["found"][tier]) for tier in ("slot", "host", "store")),
                _pair(row["cold_load_ms"]),
                _pair(row["first_token_ms"]),
                f"{row['resident_bytes'] / MIB:.1f}",
                f"{row['rss_bytes'] / MIB:,.0f}",
            )
            for row in rows
            if not row["warm"]
        ),
    )


def _cost(rows: Sequence[Row]) -> str:
    """Of the row with most adapters: the mean over all of them."""
    most = max(rows, key=lambda row: row["registered"])
    cost = most["cost"]
    return (
        f"One more registered adapter, mean of {most['registered']:,}: "
        f"{cost['disk_bytes'] / KIB:,.0f} KiB on the disk, {cost['weights_bytes'] / KIB:,.0f} of "
        f"them weights; {cost['rss_bytes'] / KIB:,.1f} KiB of memory; {cost['seconds'] * 1000:.0f} "
        f"ms to check and keep it, {cost['seconds_with_child'] * 1000:.0f} ms as an upload, whose "
        f"checks have a process of their own. In a slot it takes {cost['slot_bytes'] / KIB:,.0f} "
        "KiB."
    )


def _warm(rows: Sequence[Row]) -> str:
    """One adapter against many, all in their slots, requests spread evenly."""
    return _table(
        ("resident, none cold", "output tokens/s", "first token p50 / p99, ms", "RSS, MiB"),
        (
            (
                f"{row['registered']}",
                f"{row['tokens_per_second']:.1f}",
                _pair(row["first_token_ms"]),
                f"{row['rss_bytes'] / MIB:,.0f}",
            )
            for row in rows
            if row["warm"]
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _pair(times: Mapping[str, float] | None) -> str:
    return f"{times['p50']:,.1f} / {times['p99']:,.1f}" if times else "none"
