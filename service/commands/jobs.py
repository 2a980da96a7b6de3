"""`nibble jobs`: train on a running server: create, list, show, follow, pause, resume,
cancel, publish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml  # type: ignore[import-untyped]

from service.commands.output import fail, print_json, print_table
from service.commands.server import Json, Url, connect

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Train on a running server, and follow it.",
)
COLUMNS = ("id", "status", "step", "model", "method", "adapter", "created")
JobId = Annotated[str, typer.Argument(help="ftjob-…, as `nibble jobs list` has it.")]


@app.command()
def create(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="To learn from.")],
    validation: Annotated[
        Path | None, typer.Option("--eval", exists=True, dir_okay=False, help="Held out.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the adapter; a name that exists gets a new version.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, dora, ia3, …: `nibble train run --help` lists them.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="A prompt template of the server around every question: name@version."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="YAML, as of `nibble train`.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the schema: --set optim.steps=50; may repeat."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    publish: Annotated[bool, typer.Option(help="Serve the adapter once it is trained.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print events until it ends.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Upload data and train an adapter of it; or say what that would cost."""
    overrides = _settings(config, settings or [])
    with connect(url, as_json) as client:
        body: dict[str, Any] = {
            "model": client.info()["model_id"],
            "training_file": client.upload_file(data)["id"],
            "validation_file": client.upload_file(validation)["id"] if validation else None,
            "suffix": name,
            "method": {"type": method} if method else None,
            "template": template,
            "seed": seed,
            "config": overrides,
            "publish": publish,
            "dry_run": dry_run,
        }
        found = client.create_job(body)
        if not follow or dry_run:
            _print_one(found, as_json)
            return
        for event in client.follow_job(found["id"]):
            _print_event(event, as_json)
        ended = client.job(found["id"])
    if ended["status"] != "succeeded":
        raise typer.Exit(1)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20, url: Url = None, as_json: Json = False
) -> None:
    """List the jobs, the newest first."""
    with connect(url, as_json) as client:
        found = client.jobs(limit)
    if as_json:
        print_json(found)
    else:
        print_table(COLUMNS, [_row(job) for job in found])


@app.command()
def show(job_id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Show one job: its state, where it is, and why it failed where it did."""
    with connect(url, as_json) as client:
        _print_one(client.job(job_id), as_json)


@app.command()
def cancel(job_id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Cancel a job. One that runs ends its step first."""
    _ask(job_id, "cancel", url, as_json)


@app.command()
def pause(job_id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Pause a job; it keeps a checkpoint."""
    _ask(job_id, "pause", url, as_json)


@app.command()
def resume(job_id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Let a paused job go on from its checkpoint, bit for bit; or a failed one, tried again."""
    _ask(job_id, "resume", url, as_json)


@app.command()
def publish(job_id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Serve the adapter of a job that was created with --no-publish."""
    with connect(url, as_json) as client:
        found = client.job(job_id, "publish")
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['fine_tuned_model']} serves now")


@app.command()
def events(
    job_id: JobId,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The last ones.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="All, as they happen.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print what happened to a job, one line each."""
    with connect(url, as_json) as client:
        told = client.follow_job(job_id) if follow else client.job_events(job_id, limit)
        for event in told:
            _print_event(event, as_json)


def _ask(job_id: str, what: str, url: str | None, as_json: bool) -> None:
    with connect(url, as_json) as client:
        found = client.job(job_id, what)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{job_id}: {found['status']}")


def _settings(config: Path | None, settings: list[str]) -> dict[str, Any]:
    """The settings of a YAML file, and those of the command line, which win."""
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8")) if config else {}
        split = [text.partition("=") for text in settings]
        pairs = [(field, yaml.safe_load(value)) for field, _, value in split]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"the settings are not YAML: {error}", status=2)
    if not isinstance(found, dict) or any("=" not in text for text in settings):
        fail("settings: a mapping in a file, field=value as in --set optim.steps=50", status=2)
    for field, value in pairs:
        *sections, last = field.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                fail(f"{field}: {section} has a value already, and no fields", status=2)
        place[last] = value
    return found


def _row(job: Mapping[str, Any]) -> list[str]:
    at = job["progress"]
    return [
        job["id"],
        job["status"],
        f"{at['step']}/{at['steps'] or '?'}" if at else "-",
        job["model"],
        job["method"]["type"],
        job["fine_tuned_model"] or "-",
        datetime.fromtimestamp(job["created_at"]).isoformat(" ", "seconds"),
    ]


def _print_one(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [(key, _cell(value)) for key, value in found.items() if value not in (None, [], {})]
    print_table(("field", "value"), rows)


def _cell(value: Any) -> str:
    if isinstance(value, dict | list):
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).strip()
    return str(value)


def _print_event(event: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event, ensure_ascii=False))  # a line each, for who follows
        return
    when = datetime.fromtimestamp(event["created_at"]).isoformat(" ", "seconds")
    level = "" if event["level"] == "info" else f"{event['level']}: "
    typer.echo(f"{when}  {level}{event['message']}")
