"""What a server's own search finds for each question: the passages of the arms dense and hybrid.

The study starts a server, fills a collection for each task, asks every test question as a client
would, and keeps the passages, so an arm needs no server and a study that resumes reads the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from training.errors import TrainingError
from training.study.config import StudyConfig, TaskConfig
from training.study.material import Material
from training.study.place import Place
from training.study.questions import Found, corpus, query_of
from training.study.server import server

FILE = "retrieved.json"  # beside the task's material: {mode: {query: [passage, …]}}
MODES = ("dense", "hybrid")
BATCH = 200  # documents of one request


def found_by(reference: str, material: Path) -> Found | None:
    """The passages of a mode; None for arms that do not search."""
    if reference not in MODES:
        return None
    found: Found = json.loads((material / FILE).read_text(encoding="utf-8"))[reference]
    return found


def search(study: StudyConfig, place: Place) -> None:
    """Write what is missing. Raises TrainingError where no server comes up or it refuses."""
    modes = [mode for mode in MODES if mode in study.references]
    lacking = [task for task in study.tasks if not _has(place.material(task.name) / FILE, modes)]
    if not modes or not lacking:
        return
    with server(study) as running:
        for task in lacking:
            folder = place.material(task.name)
            material = Material.read(folder)
            fill(running.client, task, material)
            found = {mode: _asked(running.client, task, material, mode) for mode in modes}
            text = json.dumps(found, ensure_ascii=False, indent=0)
            (folder / FILE).write_text(text + "\n", encoding="utf-8")


def fill(client: httpx.Client, task: TaskConfig, material: Material) -> None:
    """A collection of the task's name with what can be looked up, in its order."""
    post(client, "/collections", {"name": collection_name(task)})
    documents = [
        {"id": f"p{number:06d}", "text": text} for number, text in enumerate(corpus(material))
    ]
    for start in range(0, len(documents), BATCH):
        some = documents[start : start + BATCH]
        post(client, f"/collections/{collection_name(task)}/documents", {"documents": some})


def collection_name(task: TaskConfig) -> str:
    """Names of collections have neither dots nor plus signs."""
    return task.name.replace(".", "-").replace("+", "-")


def post(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Raises TrainingError with what the server says."""
    reply = client.post(path, json=body)
    if reply.is_error:
        raise TrainingError(f"POST {path}: HTTP {reply.status_code}: {reply.text[:500]}")
    found: dict[str, Any] = reply.json()
    return found


def _asked(
    client: httpx.Client, task: TaskConfig, material: Material, mode: str
) -> dict[str, list[str]]:
    path = f"/collections/{collection_name(task)}/search"
    found: dict[str, list[str]] = {}
    for item in material.test:
        body = {"query": query_of(item), "k": task.passages, "mode": mode}
        passages = post(client, path, body)["passages"]
        # In the order of their places, as a prompt has them.
        ordered = sorted(passages, key=lambda p: (p["document"], p["start"]))
        found[query_of(item)] = [str(passage["text"]) for passage in ordered]
    return found


def _has(path: Path, modes: Sequence[str]) -> bool:
    return path.is_file() and set(modes) <= json.loads(path.read_text(encoding="utf-8")).keys()
