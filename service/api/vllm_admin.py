"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as controllers on Kubernetes call vLLM's.

Both want a key with the scope `admin`, and are off while the server has no key at all. An adapter
is loaded from a directory beneath `adapter_root`, which the operator mounts; its checks are those
of an upload.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import ConfigDict, Field

from adapters.errors import AdapterNotFound
from service.api.access import Keyed, needs
from service.api.adapters import delete_adapter
from service.api.deps import DeskDep, Serving, ServingDep
from service.api.openai.schema import Lenient
from service.api.openai.served import not_found
from service.api.openai_errors import openai_refusals
from service.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["admin"], route_class=Keyed)

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


_ERRORS = openai_refusals(404, 413, 415, 422, 429, 500, 503)


@router.post("/load_lora_adapter", responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
@needs("admin")
async def load(body: LoadBody, request: Request, desk: DeskDep, serving: ServingDep) -> Response:
    """Check an adapter and serve it under its name. The reply comes when it can be asked for."""
    directory = beneath(desk.settings.adapter_root, body.lora_path)
    async with desk.place(serving.caller.tenant, request):
        await desk.slowly(_load, body, directory, serving)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
@needs("admin")
async def unload(body: UnloadBody, desk: DeskDep, serving: ServingDep) -> Response:
    """Delete an adapter. What runs on it finishes first; then the reply comes."""
    try:
        await desk.slowly(delete_adapter, body.lora_name, serving)
    except AdapterNotFound as error:
        raise not_found(body.lora_name) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


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
        body.lora_name,
        directory,
        serving.spec,
        serving.limits,
        serving.probe,
        serving.assembly.tokens,
    )
