"""Runs a study: one process for each arm, one result file for each, and what is missing next time.

out/study.json                the resolved study; another study is refused here
out/material/<task>/          the items of each task, and what the base knows already
out/arms/<id>.json            a result, written whole or not at all
out/adapters/<id>/            what was trained
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from base.hub import locate
from base.mini import MINI
from base.scales import double_quant_of
from training.errors import ConfigError, MethodError, TrainingError
from training.study.arm import Arm, refused, run_arm
from training.study.config import StudyConfig
from training.study.material import make_material
from training.study.place import Place
from training.study.retention import write_retention
from training.study.schedule import arms, next_arm

EXTENDABLE = ("methods", "references", "controls", "seeds", "hypothesis", "serving", "threads")


def prepare(study: StudyConfig, place: Place) -> None:
    """Make the folder and its material. Raises ConfigError where another study lies in it."""
    place.root.mkdir(parents=True, exist_ok=True)
    kept = place.root / "study.json"
    now = study.model_dump(mode="json")
    if kept.is_file():
        # Through the schema: of a field that is new since, the study has the default. But for this
        # one: before it was there, scales were plain.
        then = json.loads(kept.read_text(encoding="utf-8"))
        then.setdefault("double_quant", False if _double_quant(study) else study.double_quant)
        before = StudyConfig.model_validate_json(json.dumps(then)).model_dump(mode="json")
        unlike = [key for key in now if key not in EXTENDABLE and before.get(key) != now[key]]
        if unlike:
            raise ConfigError(
                f"{place.root} holds a study with another {unlike[0]}: {before.get(unlike[0])!r}, "
                f"now {now[unlike[0]]!r}; name another --out"
            )
    write_json(kept, now)
    for task in study.tasks:
        if not (place.material(task.name) / "passages.json").is_file():
            make_material(task).write(place.material(task.name))
    if not place.retention.is_file():
        write_retention(study, place.retention)


def _double_quant(study: StudyConfig) -> bool:
    directory = MINI if study.base == "mini" else locate(study.base).directory
    return double_quant_of(directory, study.double_quant)


def results(place: Place) -> dict[str, dict[str, Any]]:
    """Every result on the disk by its arm's id."""
    found = {}
    for path in sorted((place.root / "arms").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[str(result["arm"]["id"])] = result
    return found


def run(
    study: StudyConfig,
    place: Place,
    began: Callable[[Arm, int, int], None] = lambda arm, done, known: None,
    limit: int | None = None,
) -> int:
    """Run the arms that are missing, in order, at most `limit`; how many ran.

    `began` hears of each arm, how many are done, and how many are known so far. A study that is
    killed loses the running arm. Raises TrainingError, with its traceback, where an arm broke.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.study.arm"])  # torch is imported once, not per arm
    ran = 0
    while limit is None or ran < limit:
        found = results(place)
        arm = next_arm(study, found)
        if arm is None:
            break
        known = sum(1 for _ in arms(study, found))
        began(arm, len(found), known)
        process = context.Process(target=_child, args=(study.model_dump_json(), place.root, arm))
        process.start()
        try:
            process.join()
        except BaseException:
            process.terminate()
            process.join()
            raise
        _check(place, arm, process.exitcode)
        ran += 1
    return ran


def _check(place: Place, arm: Arm, exitcode: int | None) -> None:
    if place.result(arm.id).is_file():
        return
    log = place.root / "arms" / f"{arm.id}.error"
    said = log.read_text(encoding="utf-8") if log.is_file() else f"exit code {exitcode}"
    raise TrainingError(f"arm {arm.id} broke; start again to go on with it.\n{said}")


def _child(study_json: str, root: Path, arm: Arm) -> None:
    """In the arm's own process, which ends with the study's."""
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    place = Place(root)
    path = place.result(arm.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.with_suffix(".error")
    broken.unlink(missing_ok=True)
    try:
        study = StudyConfig.model_validate_json(study_json)
        try:
            result = run_arm(study, place, arm)
        except MethodError as error:
            result = refused(arm, error)
        write_json(path, result)
    except Exception:
        broken.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _end_with_the_study() -> None:
    """A study that was killed must not leave an arm behind, beside which it would start again."""
    study = multiprocessing.parent_process()  # not the fork server, which outlives it
    assert study is not None
    study.join()
    os._exit(1)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
