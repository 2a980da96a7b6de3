"""`nibble plan`: how many servers a load needs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.commands.output import fail, print_json, print_table
from service.commands.server import Json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GIB = 1 << 30


@app.callback()
def _group() -> None:
    """How many servers a load needs."""


@app.command()
def fleet(
    bench: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="What `nibble bench --json` wrote, on the machine and with the model in question.",
        ),
    ],
    rate: Annotated[float, typer.Option(min=1e-3, max=1e6, help="Requests a second, in all.")],
    adapters: Annotated[int, typer.Option(min=0, max=1_000_000, help="0: the base alone.")] = 100,
    zipf: Annotated[
        float, typer.Option(min=0, max=5, help="Exponent of the adapters' shares; 0: all alike.")
    ] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 128,
    first_token: Annotated[
        float, typer.Option(min=0, help="Seconds to the first token, at the 99th percentile.")
    ] = 2.0,
    inter_token: Annotated[
        float, typer.Option(min=0, help="Seconds between two tokens, at the 99th percentile.")
    ] = 0.2,
    slots: Annotated[
        int, typer.Option(min=1, max=100_000, help="Adapters that a replica has room for.")
    ] = 32,
    load_seconds: Annotated[
        float, typer.Option(min=0, help="Of a cold adapter: `cold_load_ms` of `nibble bench zipf`.")
    ] = 0.2,
    routing: Annotated[
        Literal["adapter", "least-busy", "rendezvous"],
        typer.Option(
            help="How the gateway chooses: by which replica has the adapter, by how busy each is, "
            "or by the adapter's hash (deploy/ray)."
        ),
    ] = "adapter",
    replicas: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Say what these do, and look for no other.")
    ] = None,
    hourly_cost: Annotated[float, typer.Option(min=0, help="Of one replica.")] = 0.0,
    peer: Annotated[str, typer.Option(help="Whose figures of the file.")] = "nibble fast",
    as_json: Json = False,
) -> None:
    """The fewest replicas that meet the targets, their memory and what they cost.

    A discrete-event simulation replays what steps cost on the machine that was measured: queues,
    chunks of prompts, blocks, slots and cold adapters, on up to 4096 replicas. It does not know
    HTTP, prefix caching, speculation or tenants.
    """
    from service.plan.calibration import UnusableBench, calibrate
    from service.plan.fleet import NoFleet, Outcome, Targets, fewest, memory_bytes, outcome
    from service.plan.replay import rate_errors
    from service.plan.simulation import Server, Traffic

    for name, value in (
        ("rate", rate),
        ("zipf", zipf),
        ("first-token", first_token),
        ("inter-token", inter_token),
        ("load-seconds", load_seconds),
        ("hourly-cost", hourly_cost),
    ):
        if not math.isfinite(value):  # NaN passes a range's bounds
            fail(f"--{name} is {value}", "Give a number.", as_json=as_json)
    try:
        figures = json.loads(bench.read_text(encoding="utf-8"))
        known = calibrate(figures, peer)
    except (UnusableBench, ValueError) as error:
        fail(f"{bench}: {error}", "Run `nibble bench --json FILE`.", as_json=as_json)
    traffic = Traffic(rate, adapters, zipf, prompt_tokens, new_tokens)
    server = Server(known.cost, known.kv_cache_bytes // known.token_bytes, slots, load_seconds)
    if prompt_tokens + new_tokens > server.kv_tokens:
        fail(
            f"{prompt_tokens + new_tokens} tokens do not fit in a KV cache of {server.kv_tokens}",
            "Measure with a larger cache, or ask for fewer tokens.",
            as_json=as_json,
        )
    tried: list[Outcome] = []
    targets = Targets(first_token, inter_token)
    try:
        if replicas is None:
            found = fewest(traffic, server, targets, routing, tried.append)
        else:
            found = outcome(traffic, server, replicas, routing)
    except NoFleet as error:
        step = "Loosen --first-token or --inter-token, or measure a faster machine."
        fail(str(error), step, as_json=as_json)
    errors = rate_errors(figures, known)
    each = memory_bytes(known, slots)
    hourly = found.replicas * hourly_cost
    millions = rate * new_tokens * 3600 / 1e6
    if as_json:
        print_json(
            {
                "traffic": asdict(traffic),
                "targets": asdict(targets),
                "met": found.meets(targets),
                **_finite(asdict(found)),
                "memory_bytes": each,
                "hourly_cost": hourly,
                "cost_per_million_tokens": hourly / millions,
                "calibration": asdict(known),
                "rate_errors": errors,
                "tried": [_finite(asdict(one)) for one in tried],
            }
        )
        return
    rows = [
        ("replicas", found.replicas),
        ("targets", "met" if found.meets(targets) else "missed"),
        ("load", f"{found.load:.0%} of what they do at most"),
        ("first token", _times(found.first_token_p50, found.first_token_p99)),
        ("between tokens", _times(found.inter_token_p50, found.inter_token_p99)),
        ("cold requests", f"{found.cold_rate:.1%}"),
        ("memory", f"{each / GIB:.2f} GiB a replica, {found.replicas * each / GIB:.2f} in all"),
        ("cost", f"{hourly:g} an hour, {hourly / millions:.4g} a million tokens"),
        ("calibration", f"{known.peer}, {known.model}; equations fit to {known.worst_fit:.0%}"),
        *((f"replayed: {name}", f"{error:+.0%} tokens/s") for name, error in errors.items()),
    ]
    print_table(("", ""), rows)


def _times(half: float, most: float) -> str:
    if most == float("inf"):
        return "a queue overflows"
    return f"p50 {1000 * half:.0f} ms, p99 {1000 * most:.0f} ms"


def _finite(found: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {key: None if value == float("inf") else value for key, value in found.items()}
