"""What a request costs in each of the study's ways: tokens, milliseconds, and what lies prepared.

Each way is asked as a client would ask it: a chat, a prompt template by its name, a collection, an
adapter. The ways take turns at the same test questions, one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from adapters.prompts.shelf import read_template
from training.study.config import Reference, StudyConfig, TaskConfig
from training.study.material import Material
from training.study.place import Place
from training.study.questions import Questions, body_of
from training.study.retrieved import MODES, collection_name, fill, post
from training.study.server import Running, served_name
from training.tasks import Item

QUESTIONS = 20
LONGEST = 32  # tokens of an answer

Ways = dict[str, tuple[Reference, str | None]]  # arm's id -> how it is asked, and its adapter


def cost_of_requests(
    running: Running, study: StudyConfig, place: Place, adapters: Sequence[str]
) -> dict[str, Any]:
    """By the arm's id: `ms`, `prompt_tokens`, `answer_tokens`, and `prepared_bytes` of a reference.

    `adapters` are the arms whose adapters the server has. Tasks without questions have none.
    """
    found: dict[str, Any] = {}
    for task in study.tasks:
        if task.metric != "nats":
            material = Material.read(place.material(task.name))
            ways: Ways = {f"{task.name}.{name}": (name, None) for name in study.references}
            ways |= {a: ("zero_shot", a) for a in adapters if a.startswith(f"{task.name}.")}
            found |= _task(running, task, material, ways)
    return found


def _task(running: Running, task: TaskConfig, material: Material, ways: Ways) -> dict[str, Any]:
    prepared = _prepare(running, task, material, {name for name, _ in ways.values()})
    asked = {name: Questions(task, material, name) for name, _ in ways.values()}
    spent: dict[str, list[tuple[float, int, int]]] = {way: [] for way in ways}
    items = material.test
    for turn in range(QUESTIONS + 1):  # the first loads what is cold, and does not count
        for way, (name, adapter) in ways.items():
            # A question's vector is remembered: hybrid gets others than dense has had.
            item = items[(turn + (name == "hybrid") * (QUESTIONS + 1)) % len(items)]
            body = _body(task, name, item, asked[name], adapter)
            spent[way].append(_ask(running, body))
    return {
        way: {
            "ms": round(1000 * median(one[0] for one in costs[1:]), 2),
            "prompt_tokens": round(fmean(one[1] for one in costs[1:]), 1),
            "answer_tokens": round(fmean(one[2] for one in costs[1:]), 1),
            "prepared_bytes": None if ways[way][1] else prepared.get(ways[way][0], 0),
            "questions": len(costs) - 1,
        }
        for way, costs in spent.items()
    }


def _prepare(
    running: Running, task: TaskConfig, material: Material, names: Iterable[Reference]
) -> dict[str, int]:
    """What a reference needs on the server beforehand, and its bytes there."""
    wanted, sizes = set(names), {}
    if "template" in wanted:
        assert task.template is not None
        template = read_template(task.template)[1]
        post(running.client, "/templates", {"name": _template(task), **template.plain()})
        sizes["template"] = task.template.stat().st_size
    if wanted & set(MODES):
        fill(running.client, task, material)
        kept = running.home.rglob(f"{collection_name(task)}.lance/**/*")
        size = sum(path.stat().st_size for path in kept if path.is_file())
        sizes |= dict.fromkeys(MODES, size)
    return sizes


def _body(
    task: TaskConfig, name: Reference, item: Item, questions: Questions, adapter: str | None
) -> Mapping[str, Any]:
    body = body_of(name, item, questions, task.passages, collection_name(task), _template(task))
    parameters: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False, "details": True}
    if adapter is not None:
        parameters["adapter_id"] = served_name(adapter)
    return {**body, "parameters": parameters}


def _ask(running: Running, body: Mapping[str, Any]) -> tuple[float, int, int]:
    """Seconds, tokens of the prompt, tokens of the answer."""
    started = time.perf_counter()
    details = post(running.client, "/generate", body)["details"]
    seconds = time.perf_counter() - started
    return seconds, int(details["prompt_tokens"]), int(details["generated_tokens"])


def _template(task: TaskConfig) -> str:
    return f"study-{collection_name(task)}"
