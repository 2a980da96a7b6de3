"""docs/PERFORMANCE.md: the figures of one run as a page, with its chart beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.kernels import bench_page
from service.bench.chart import bar_chart
from service.bench.plan import NIBBLE

MIB = 1 << 20
SIDE_BY_SIDE = (
    "Of the first precision, 8 distinct LoRAs, 8 DoRAs and 8 without adapter were measured once "
    "more side by side, with no other peer in between: ratios of these are of those rounds, above "
    "too."
)
Figures = Mapping[str, Any]


def write_page(figures: Figures, path: Path) -> Path:
    """The page at `path`, the chart beside it as .svg; returns where the chart is.

    What `nibble bench --kernel` wrote to that page before stays as its last section.
    """
    chart = path.with_suffix(".svg")
    held = f", held to {figures['isa']}" if figures["isa"] else ""
    title = f"{figures['model']}, {figures['threads']} threads, {figures['machine']['cpu']}{held}"
    chart.write_text(bar_chart(figures["results"], title), encoding="utf-8")
    kernels = bench_page.section_of(path.read_text(encoding="utf-8")) if path.exists() else ""
    path.write_text(performance_markdown(figures, chart.name), encoding="utf-8")
    if kernels:
        bench_page.put(path, kernels)
    return chart


def performance_markdown(figures: Figures, chart: str) -> str:
    """The whole page."""
    parts = [
        f"# Performance, held to {figures['isa']}" if figures["isa"] else "# Performance",
        "Written by `nibble bench` from one run; change nothing here by hand.",
        _setting(figures),
        f"![output tokens per second]({chart})",
        "## Targets",
        _targets(figures["targets"]),
        "## Throughput and latency",
        "Tokens/s of all requests together, their prompts' time included; the median of the "
        "rounds. Times in ms, p50 / p99. *Of the limit* is the least time that a step can take "
        "on this machine over the time that it took: bytes read over bandwidth or multiply-adds "
        "over arithmetic, whichever is more.",
        _results(figures["results"]),
        "## Beside the others",
        _ratios(figures["ratios"]),
        "## What adapters cost",
        SIDE_BY_SIDE if figures["side_by_side"] else "",
        _own(figures["own_ratios"]),
        "## Registered and resident adapters",
        _registered(figures["registered"]),
        "## The limits of the machine",
        _limits(figures["limits"]),
        "## Starts and memory",
        _starts(figures["starts"]),
        _memory(figures["memory"]),
        "## Versions",
        _versions(figures),
        _notes(figures["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(figures: Figures) -> str:
    machine = figures["machine"]
    gib = machine["memory_total"] / (1 << 30)
    held = f" All that measures is held to {figures['isa']}." if figures["isa"] else ""
    return (
        f"{figures['date']}; {machine['cpu']}, {machine['cores']} cores "
        f"({', '.join(machine['features'])}), {gib:.0f} GiB; {figures['threads']} threads of every "
        f"peer. Base `{figures['model']}`; {figures['prompt_tokens']} tokens in and "
        f"{figures['new_tokens']} out unless the workload says otherwise; LoRA and DoRA of rank "
        f"{figures['lora_rank']} on all linear layers. Every peer has its own process and the same "
        f"weights, prompts and threads; they take turns. Rounds: {_rounds(figures['results'])}."
        f"{held}\n\n"
        f"    {_without_paths(figures['command'])}"
    )


def _rounds(rows: Sequence[Figures]) -> str:
    """How many each peer was asked for, its ways apart where they differ."""
    asked: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        ways = asked.setdefault(row["peer"], {}).setdefault(row["rounds"], [])
        ways += [row["way"]] if row["way"] not in ways else []
    said = [
        f"{peer} {', '.join(_counted(count, ways, len(counts)) for count, ways in counts.items())}"
        for peer, counts in asked.items()
    ]
    short = any(len(row["tokens_per_second_rounds"]) < row["rounds"] for row in rows)
    return "; ".join(said) + ("; less where the time was up" if short else "")


def _counted(count: int, ways: Sequence[str], counts: int) -> str:
    return f"{count}" if counts == 1 else f"{count} ({', '.join(ways)})"


def _targets(rows: Sequence[Figures]) -> str:
    def answer(row: Figures) -> str:
        return "not measured" if row["reached"] is None else "yes" if row["reached"] else "no"

    return "\n\n".join(
        (
            "Each a ratio within this run, `nibble` in its default precision; the interval is from "
            "the lowest round to the highest, and for registered and resident adapters what the "
            "median lies in with 95 % confidence (all rounds where they are less than 6).",
            table(
                ("what", "target", "over", "ratio", "reached"),
                (
                    (row["what"], row["target"], row["over"], _exactly(row), answer(row))
                    for row in rows
                ),
            ),
        )
    )


def _registered(figures: Figures | None) -> str:
    """Growth, many resident against one, and Zipf's traffic."""
    if figures is None:
        return "Not measured in this run."
    resident, zipf = figures["resident"], figures["zipf"]
    growth = table(
        (
            "registered",
            "a token, ms",
            "over the first",
            "processor time of a token, ms",
            "over the first",
        ),
        (
            (
                f"{row['registered']:,}",
                f"{row['token_ms']:.2f}",
                _exactly(row),
                f"{row['cpu_ms']:.2f}",
                _exactly(row["cpu"]),
            )
            for row in figures["growth"]
        ),
    )
    return "\n\n".join(
        (
            "`nibble serve` over HTTP, a server for each number of registered adapters and one "
            "more for the first number, all alive at once: the last row is what this measurement "
            "cannot tell apart. Each is asked for the same adapter by its name, 8 requests at a "
            f"time, in turns of a second, forwards and backwards, {figures['growth'][0]['rounds']} "
            "rounds of both; the servers start anew in between. Ratios are medians of the rounds, "
            "with the interval that the median lies in with 95 % confidence. Processor time is "
            "that of all threads of the server.",
            growth,
            f"{resident['adapters']} adapters of rank {resident['rank']} in their slots, requests "
            f"spread evenly over them, 8 at a time: {resident['many_tokens_per_second']:.1f} "
            f"tokens/s; all to one of them {resident['one_tokens_per_second']:.1f}; the ratio is "
            f"{_exactly(resident)}.",
            f"Zipf's traffic over {zipf['registered']:,} adapters with memory for "
            f"{zipf['resident']}: {zipf['requests']} requests named {zipf['distinct']} of them, "
            f"{zipf['hit_rate']:.0%} found theirs in memory, {zipf['tokens_per_second']:.1f} "
            f"tokens/s; a cold load took {_pair(zipf['cold_load_ms'])} ms, the first token "
            f"{_pair(zipf['first_token_ms'])} ms (p50 / p99). More: [RESIDENCY.md](RESIDENCY.md).",
        )
    )


def _starts(rows: Sequence[Figures]) -> str:
    if not rows:
        return ""
    return "\n\n".join(
        (
            "`nibble serve`, a new process each time, until `/ready`. The first start finds "
            "nothing kept; a second one maps what the first left. `import torch` alone takes "
            f"{rows[0]['import_torch_seconds']:.2f} s here. Memory is that of the process after "
            "its first request; the budget is NF4 × 1.15, embeddings, keys and values in use, and "
            "250 MB. Once ready, a server unmaps the pages of libraries that only its start read: "
            "they stay in the page cache, and count here when they are read again.",
            table(
                (
                    "base",
                    "first start, s",
                    "second start, s (each)",
                    "peak while quantising, MiB",
                    "resident at a second start, MiB",
                    "budget, MiB",
                ),
                (
                    (
                        f"{row['model']}, {row['precision']}",
                        f"{row['first_seconds']:.1f}",
                        f"{row['second_seconds']:.1f} ({_listed(row['second_seconds_all'])})",
                        f"{row['first_peak_bytes'] / MIB:,.0f}",
                        f"{row['rss_bytes'] / MIB:,.0f}",
                        f"{row['budget_bytes'] / MIB:,.0f}" if "budget_bytes" in row else "",
                    )
                    for row in rows
                ),
            ),
        )
    )


def _results(rows: Sequence[Figures]) -> str:
    head = ("workload", "who", "tokens/s", "first token", "between tokens", "of the limit")
    lines, last = [], None
    for row in rows:
        unit = " (prompt)" if row["counts"] == "prompt" else ""
        lines.append(
            (
                row["scenario"] if row["scenario"] != last else "",
                f"{row['peer']}: {row['way']}",
                f"{row['tokens_per_second']:,.1f}{unit}",
                _pair(row["first_token_ms"]),
                _pair(row["inter_token_ms"]),
                _share(row["limit"]),
            )
        )
        last = row["scenario"]
    return table(head, lines)


def _share(limit: Figures | None) -> str:
    return f"{limit['of_limit']:.0%} ({limit['bound_by']})" if limit else ""


def _ratios(ratios: Sequence[Figures]) -> str:
    if not ratios:
        return "No other peer was measured in this run."
    return table(
        ("workload", "who", "over", "times (lowest to highest round)"),
        ((r["scenario"], r["peer"], r["over"], _spread(r)) for r in ratios),
    )


def _own(ratios: Sequence[Figures]) -> str:
    if not ratios:
        return "The workloads of this run do not tell."
    return table(
        ("rate over rate", "who", "ratio (lowest to highest round)"),
        ((r["what"], r["peer"], _spread(r)) for r in ratios),
    )


def _limits(limits: Figures) -> str:
    int8 = limits["int8_gops"]
    return table(
        ("limit", "measured by the bench"),
        (
            ("reading memory: the sum of 256 MB", f"{limits['read_gbytes']:.1f} GB/s"),
            ("float32: torch's product of 1024×1024", f"{limits['float32_gflops']:,.0f} GFLOP/s"),
            ("int8: the same in bytes", f"{int8:,.0f} GOP/s" if int8 else "not available"),
        ),
    )


def _memory(memory: Figures) -> str:
    return table(
        (f"a process that only serves the base, {NIBBLE} {memory['precision']}", "MiB"),
        (
            (name, f"{memory[key] / MIB:,.0f}")
            for name, key in (
                ("resident (RSS)", "rss_bytes"),
                ("NF4 weights", "nf4_bytes"),
                ("embeddings", "embedding_bytes"),
                ("KV cache, when it is full", "kv_cache_bytes"),
                ("peak while loading", "peak_rss_bytes"),
            )
        ),
    )


def _versions(figures: Figures) -> str:
    lines = [f"{name} {number}" for name, number in figures["machine"]["versions"].items()]
    for peer, facts in figures["peers"].items():
        said = [str(facts[key]) for key in ("version", "dtype", "kernels") if key in facts]
        lines.append(f"{peer}: {'; '.join(said)}")
    return "\n".join(f"- {line}" for line in lines)


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(["## Notes", "", *(f"- {note}" for note in notes)]) if notes else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _pair(times: Figures | None) -> str:
    return f"{times['p50']:,.1f} / {times['p99']:,.1f}" if times else ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _exactly(ratio: Figures) -> str:
    """With three digits, since some targets are a few in a hundred."""
    if ratio["ratio"] is None:
        return ""
    return f"{ratio['ratio']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f})"


def _spread(ratio: Figures) -> str:
    return f"{ratio['ratio']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _without_paths(command: str) -> str:
    """The command without the places of this machine: where models are kept and the JSON goes."""
    words = shlex.split(command)
    for option in ("--cache", "--json", "--llama-server"):
        if option in words[:-1]:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(words)
