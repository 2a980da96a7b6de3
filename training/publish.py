"""A trained adapter to where it is served: uploaded to a running server, or put into its store."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from adapters import evaluation, origin
from adapters.errors import AdapterError
from adapters.limits import Limits
from adapters.lowering import lower
from adapters.manifest import AdapterManifest
from adapters.prompts.shelf import PROVENANCE, SUFFIXES, read_template
from adapters.store import TEMPLATE_FILE, AdapterStore, read_provenance, read_small
from base.load import Base
from training.config import PublishConfig, TrainConfig
from training.errors import PublishError
from training.methods.files import CONFIG, WEIGHTS
from training.recipe import Trained

SECONDS = 600.0  # the server's checks and trial run included


def publish(config: TrainConfig, base: Base) -> str:
    """Bring the adapter in `config.out` to where `config.publish` says; `name@version` there.

    Raises PublishError.
    """
    wanted = config.publish
    assert wanted is not None, "asked only where something is to be published"
    try:
        if wanted.store is not None:
            found = _put(wanted, wanted.store, config, base)
        else:
            found = _upload(wanted, config.out)
    except (AdapterError, httpx.HTTPError, OSError) as error:
        where = wanted.url or wanted.store
        raise PublishError(
            f"the adapter is in {config.out}, and was not published to {where}: {error}"
        ) from error
    return found


def _upload(wanted: PublishConfig, out: Path) -> str:
    """Over HTTP, as `nibble adapters push` does, with the key in NIBBLE_API_KEY."""
    key = os.environ.get("NIBBLE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    template = out / TEMPLATE_FILE
    fields = {"name": wanted.name}
    if template.is_file():
        fields["template"] = template.read_text(encoding="utf-8")
    with ExitStack() as stack:
        files = {
            "config": stack.enter_context((out / CONFIG).open("rb")),
            "weights": stack.enter_context((out / WEIGHTS).open("rb")),
        }
        for part in (evaluation, origin):
            if (out / part.FILE).is_file():
                files[part.KEY] = stack.enter_context((out / part.FILE).open("rb"))
        url = f"{str(wanted.url).rstrip('/')}/adapters"
        reply = httpx.post(url, data=fields, files=files, headers=headers, timeout=SECONDS)
    if reply.is_error:
        raise PublishError(f"{out} was refused by {url}: {_reason(reply)}")
    body = reply.json()
    return f"{body['name']}@{body['version']}"


def _reason(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}"


def _put(wanted: PublishConfig, home: Path, config: TrainConfig, base: Base) -> str:
    """Into the store of a server that reads it at its next start, or at once where it runs."""
    home.mkdir(parents=True, exist_ok=True)
    store = AdapterStore(str(home / "blobs"), str(home / "catalog.db"))
    limits, out = Limits(), config.out
    template = out / TEMPLATE_FILE

    def trial(draft: AdapterManifest, weights: Path) -> None:
        lower(draft, weights, base)

    try:
        found = store.add(
            wanted.name,
            read_small(out / CONFIG, limits.max_config_bytes, "config"),
            out / WEIGHTS,
            template.read_text(encoding="utf-8") if template.is_file() else None,
            base.spec,
            limits,
            provenance=read_provenance(out),
            probe=trial,
        )
    finally:
        store.close()
    return f"{found.name}@{found.version}"


def note_origin(config: TrainConfig, done: Trained) -> None:
    """Write training.json beside the adapter: its config, the digest of each file of its data and
    what the run did. Of paths only the last part, for the rest says where they lay on a machine."""
    fields = config.model_dump(mode="json", exclude={"out", "publish", "logs"})
    for name in ("train", "eval", "template"):
        if fields["data"][name] is not None:
            fields["data"][name] = Path(fields["data"][name]).name
    if Path(config.base).is_dir():
        fields["base"] = Path(config.base).resolve().name
    files = {"train": config.data.train, "eval": config.data.eval}
    found: dict[str, Any] = {
        "config": fields,
        "data": {part: digest for part, path in files.items() if (digest := _found(path))},
        "run": done.figures(),
    }
    if digest := _prompt_digest(config.data.template):
        found[PROVENANCE] = digest
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (config.out / origin.FILE).write_text(text, encoding="utf-8")


def _found(path: Path | None) -> str | None:
    """The digest of a file or folder; None where it has gone while the run went on."""
    try:
        return None if path is None else _digest(path)
    except OSError:
        return None


def _prompt_digest(path: Path | None) -> str | None:
    """Of the prompt template that the run was trained with, if it was and is still there."""
    try:
        return read_template(path)[1].digest if path and path.suffix in SUFFIXES else None
    except AdapterError:
        return None


def _digest(path: Path) -> str:
    """sha-256 of a file; of a folder, over the names and digests of its files."""
    if path.is_dir():
        parts = [f"{one.name}:{_digest(one)}" for one in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
