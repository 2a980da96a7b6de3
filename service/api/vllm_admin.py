"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as controllers on Kubernetes call vLLM's.

Both are off (404) unless `admin_key` is set, and want it as a bearer. An adapter is loaded from a
directory beneath `adapter_root`, which the operator mounts; its checks are those of an upload.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import ConfigDict, Field

from adapters.errors import AdapterNotFound
from service.api.adapters import delete_adapter
from service.api.deps import Desk, DeskDep, Serving, ServingDep
from service.api.errors import Refused
from service.api.openai.schema import Lenient
from service.api.openai.served import not_found
from service.api.openai_errors import openai_refusals
from service.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["admin"])

AdapterName = Annotated[str, Field(min_length=1, max_length=64)]


class LoadBody(Lenient):
    """An adapter in a directory, and the name that it gets here."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "support", "lora_path": "support"}]}
    )

    lora_name: AdapterName
    lora_path: str = Field(
        min_length=1,
        max_length=1024,
        description="A directory beneath adapter_root: from there, or absolute.",
    )
    load_inplace: bool = Field(
        default=False, description="A name that exists gets a new version; else it is refused."
    )


class UnloadBody(Lenient):
    """An adapter that is to go, all versions of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "support"}]})

    lora_name: AdapterName


_ERRORS = openai_refusals(401, 404, 413, 415, 422, 429, 500, 503)


@router.post("/load_lora_adapter", responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
async def load(body: LoadBody, request: Request, desk: DeskDep, serving: ServingDep) -> Response:
    """Check an adapter and serve it under its name. The reply comes when it can be asked for."""
    check_key(request, desk)
    directory = beneath(desk.settings.adapter_root, body.lora_path)
    async with desk.uploads:
        await desk.slowly(_load, body, directory, serving)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
async def unload(
    body: UnloadBody, request: Request, desk: DeskDep, serving: ServingDep
) -> Response:
    """Delete an adapter. What runs on it finishes first; then the reply comes."""
    check_key(request, desk)
    try:
        await desk.slowly(delete_adapter, body.lora_name, serving)
    except AdapterNotFound as error:
        raise not_found(body.lora_name) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def check_key(request: Request, desk: Desk) -> None:
    """Raise Refused: 404 where there is no key at all, 401 where another one came."""
    key = desk.settings.admin_key
    if key is None:
        raise Refused(
            404, "not_found", "this route is off: set admin_key, and send it as a bearer token"
        )
    given = request.headers.get("authorization", "")
    want = f"Bearer {key.get_secret_value()}"
    if not hmac.compare_digest(given.encode(), want.encode()):
        raise Refused(401, "invalid_api_key", "send the server's admin_key as a bearer token")


def beneath(root: Path | None, path: str) -> Path:
    """The directory that `path` names, links followed, if it is beneath `root`.

    Raises InvalidRequest; the message says nothing of what else is on the disk.
    """
    field = "lora_path"
    if root is None:
        raise InvalidRequest("set adapter_root: the directory that adapters are loaded from", field)
    if "\0" in path:
        raise InvalidRequest("a path has no NUL in it", field)
    home = root.resolve()
    try:
        found = (home / path).resolve(strict=True)
    except (OSError, RuntimeError):
        found = None
    if found is None or home not in found.parents or not found.is_dir():
        raise InvalidRequest(f"{path[:200]!r} is no directory beneath adapter_root", field)
    return found


def _load(body: LoadBody, directory: Path, serving: Serving) -> None:
    if not body.load_inplace:
        try:
            serving.store.resolve(body.lora_name)
        except AdapterNotFound:
            pass
        else:
            raise InvalidRequest(
                f"adapter {body.lora_name!r} is there already: unload it, or set load_inplace",
                "lora_name",
            )
    serving.store.add_directory(
        body.lora_name, directory, serving.spec, serving.limits, serving.probe
    )
