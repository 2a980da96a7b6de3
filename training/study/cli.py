"""`nibble compare`: a study from one file, and its report."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from training.study.arm import Arm
from training.study.best import keep_best
from training.study.config import StudyConfig, read_study
from training.study.findings import Findings, find
from training.study.markdown import markdown
from training.study.page import page
from training.study.place import Place
from training.study.retrieved import search
from training.study.runner import prepare, results, run, write_json
from training.terminal import console, print_json, quiet, refusals

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
VERSIONS = ("torch", "transformers", "peft")


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="YAML; docs/study/study.yaml is one.")],
    out: Annotated[Path, typer.Option(help="Results, adapters and the report; one study each.")],
    arms: Annotated[
        int | None, typer.Option(min=0, help="Run at most so many more; 0: only the report.")
    ] = None,
    serve: Annotated[bool, typer.Option(help="Time each kept adapter on a server.")] = True,
    serving_only: Annotated[
        bool,
        typer.Option("--serving-only", help="Run no arm: time the adapters that are kept, again."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Compare methods with one budget: learning rates by validation, seeds, references, controls.

    Every arm has a process and a result file of its own. A study that was stopped goes on with the
    arms that are missing; the report is written again each time. Times of serving are true where
    nothing else runs: --serving-only takes them once the machine is quiet.
    """
    if serving_only and (arms is not None or not serve):
        raise typer.BadParameter("--serving-only runs no arms and serves: leave out the other")
    with refusals(as_json), quiet(as_json):
        found, place = read_study(study), Place(out)
        prepare(found, place)
        try:
            if not serving_only:
                _run(found, place, arms)
            if serving_only or (serve and found.serving and arms is None):
                from training.study.serving import measure

                write_json(place.root / "serving.json", measure(found, place))
        except KeyboardInterrupt:
            report(found, place, study)
            console.print(f"stopped; {out} keeps what has run, and the same command goes on")
            raise typer.Exit(130) from None
        findings = report(found, place, study)
    counted = {"arms": len(findings.rows), "missing": len(findings.missing)}
    if as_json:
        print_json({"out": str(out), **counted})
        return
    missing = f"; {len(findings.missing)} arms have not run" if findings.missing else ""
    console.print(
        f"{out}/report.html, report.md and report.json: {len(findings.rows)} arms{missing}"
    )


def _run(study: StudyConfig, place: Place, limit: int | None) -> None:
    if limit != 0:
        search(study, place)
    started = time.monotonic()

    def began(arm: Arm, done: int, known: int) -> None:
        minutes = (time.monotonic() - started) / 60
        console.print(f"{minutes:6.1f} min  {done:>3} of {known} and more  {arm.id}")

    run(study, place, began, limit)


def report(study: StudyConfig, place: Place, source: Path) -> Findings:
    """Write report.json, report.md and report.html."""
    served = place.root / "serving.json"
    serving = json.loads(served.read_text(encoding="utf-8")) if served.is_file() else None
    ran = results(place)
    findings = find(study, ran, serving)
    keep_best(study, place, ran)
    command = shlex.join(["nibble", "compare", _shown(source), "--out", _shown(place.root)])
    made = _made(place, command)
    (place.root / "report.md").write_text(markdown(findings, made), encoding="utf-8")
    (place.root / "report.html").write_text(page(findings, made), encoding="utf-8")
    write_json(place.root / "report.json", as_json(findings, made))
    return findings


def _shown(path: Path) -> str:
    """As it was given; of one from the root the name alone: the rest is of this machine."""
    return path.name if path.is_absolute() else str(path)


def as_json(findings: Findings, made: str) -> dict[str, Any]:
    """All findings. Pairs that name something are joined by a slash."""
    fields = {
        name: value
        for name, value in asdict(findings).items()
        if name not in ("study", "trials", "transfer", "verdict")
    }
    verdict = findings.verdict
    return {
        "made": made,
        "study": findings.study.model_dump(mode="json"),
        **fields,
        "trials": {
            f"{task}/{name}": {f"{rate:g}": loss for rate, loss in tried.items()}
            for (task, name), tried in findings.trials.items()
        },
        "transfer": {f"{own}/{asked}": value for (own, asked), value in findings.transfer.items()},
        "verdict": None if verdict is None else {**asdict(verdict), "holds": verdict.holds},
    }


def _made(place: Place, command: str) -> str:
    ran = [path.stat().st_mtime for path in (place.root / "arms").glob("*.json")]
    day = time.strftime("%Y-%m-%d", time.gmtime(max(ran, default=time.time())))
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return (
        f"Made by `{command}`; the last arm ended on {day}. {_machine()}, {os.cpu_count()} "
        f"processors; {versions}."
    )


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
