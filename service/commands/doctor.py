"""`nibble doctor`: what this machine is, which bases fit on it, and what could go wrong here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from base.machine import ARITHMETIC, Fit, Machine, choose_dtype, fits, inspect
from service.commands.installation import shadowed, versions
from service.commands.output import fail, print_json, print_table
from service.commands.server import Json
from service.config import GIB, MIB, ConfigError, Settings, configure
from service.net.library import load as load_filter

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: what to choose for.")] = "auto",
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="As of `nibble serve`. Default: what a variable or nibble.toml sets."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what this machine is, which base sizes fit in NF4, and the dtype it will compute in.

    Ends with status 1 when something here would keep nibble from working.
    """
    from base.fingerprint import default_cache_dir
    from base.kept import kept_bytes, kept_folder  # imports torch
    from base.kernels import fast_status, native_status

    cache = default_cache_dir()
    try:
        settings = configure({"kv_dtype": kv_dtype}).settings
    except ConfigError as error:
        fail(str(error), status=2, as_json=as_json)
    machine, kept = inspect(), settings.kv_dtype
    refused = _refused(settings, cache)
    dtype, why = choose_dtype(machine, device)
    problem = shadowed()
    if as_json:
        print_json(
            {
                "machine": asdict(machine),
                "dtype": {"name": dtype, "why": why},
                "kernels": native_status(),
                "accept_filter": load_filter()[1],
                "precision": {"default": _default_precision(), "fast": fast_status()},
                "kept": {"bases": str(kept_folder(cache)), "bytes": kept_bytes(cache)},
                "kv_dtype": kept,
                "fits": [_as_json(fit) for fit in fits(machine, kept)],
                "versions": versions(),
                "stored_adapters": refused,
                "problem": problem,
            }
        )
    else:
        computed = {
            "dtype": f"{dtype}: {why}",
            "CPU kernels": native_status(),
            "accept filter": load_filter()[1],
            "precision": f"{_default_precision()} unless --precision; fast: {fast_status()}",
            "kept bases": f"{_gib(kept_bytes(cache))} in {kept_folder(cache)}; may be removed",
        }
        computed["KV cache"] = f"{kept}: {dtype}" if kept == "auto" else kept
        _print_machine(machine, computed)
        _print_fits(fits(machine, kept))
        if refused:
            typer.echo(f"\nstored adapters: {refused}")
        typer.echo(f"\n{'problem: ' + problem if problem else 'nothing stands in the way'}")
    if problem:
        raise typer.Exit(1)


def _refused(settings: Settings, cache: Path) -> str | None:
    """Why stored adapters will be refused by a server with these settings: they were made over
    other scales of its base. Of a base and a catalog that are files here; neither is changed."""
    from adapters.catalog import Catalog
    from adapters.config_schema import other_scales
    from adapters.errors import StoreUnavailable
    from base.checkpoint import read_json, weight_files
    from base.errors import UnservableBase
    from base.fingerprint import fingerprints
    from base.hub import locate
    from base.scales import double_quant_of

    directory, rows = Path(settings.base_source), settings.catalog.removeprefix("sqlite:///")
    config = read_json(directory / "config.json") if directory.is_dir() else {}
    if not config or config.get("quantization_config") or not Path(rows).is_file():
        return None
    try:
        double = double_quant_of(directory, settings.double_quant)
        catalog = Catalog(settings.catalog, migrate=False)
        twin = fingerprints(config, weight_files(directory), cache)[not double]
        stored = catalog.made_for(twin)
        catalog.close()
    except (StoreUnavailable, UnservableBase) as error:
        return str(error)
    return other_scales(locate(str(directory)).id, double, stored) if stored else None


def _default_precision() -> str:
    return str(Settings.model_fields["precision"].default)


def _print_machine(machine: Machine, more: Mapping[str, str]) -> None:
    memory = f"{_gib(machine.memory_available)} free of {_gib(machine.memory_total)}"
    rows = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores"),
        ("features", " ".join(machine.features) or "none of those that matter"),
        ("memory", memory),
    ]
    rows += [
        ("GPU", f"{gpu.name}, {_gib(gpu.memory_free)} free of {_gib(gpu.memory_total)}")
        for gpu in machine.gpus
    ] or [("GPU", "none")]
    rows += list(more.items())
    rows += [(name, found or "not installed") for name, found in versions().items()]
    print_table(("this machine", ""), rows)


def _print_fits(found: Sequence[Fit]) -> None:
    typer.echo("")
    rows = [
        (
            fit.size.label,
            f"{_gib(fit.serving_bytes)} {'fits' if fit.serves else 'too large'}",
            f"{_gib(fit.training_bytes)} {'fits' if fit.trains else 'too large'}",
        )
        for fit in found
    ]
    print_table(("base in NF4", "serving", "training"), rows)
    typer.echo("counted in:")
    for name, what in ARITHMETIC.items():
        typer.echo(f"  {name}: {what}")


def _as_json(fit: Fit) -> dict[str, Any]:
    return {
        "size": fit.size.label,
        "budget": fit.budget,
        "serving": {"bytes": fit.serving_bytes, "fits": fit.serves, **fit.serving},
        "training": {"bytes": fit.training_bytes, "fits": fit.trains, **fit.training},
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
