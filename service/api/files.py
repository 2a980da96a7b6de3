"""Training files over HTTP, in the shape of OpenAI's files API."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field

from service.api.access import Guarded, needs
from service.api.deps import DeskDep, ServingDep
from service.api.file_upload import PURPOSE, Arrived, received
from service.api.openai_errors import openai_refusals
from service.api.wire import Outgoing, PathName
from service.jobs.files import TrainingFile, TrainingFiles

MAX_PAGE = 10_000
router = APIRouter(prefix="/v1/files", tags=["files"], route_class=Guarded)

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": ".jsonl, .json, .csv, .tsv or .parquet",
                        },
                    },
                }
            }
        },
    }
}
After = Annotated[
    str | None, Query(min_length=1, max_length=80, description="The id that came last.")
]


class FileView(Outgoing):
    """One file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since the epoch.")
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    sha256: str


class FileList(Outgoing):
    object: Literal["list"] = "list"
    data: list[FileView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(Outgoing):
    id: str
    object: Literal["file"] = "file"
    deleted: bool


@router.post(
    "",
    openapi_extra=_FORM,
    responses={200: {"model": FileView}, **openai_refusals(408, 413, 415, 422, 429, 503, 507)},
)
@needs("train")
async def upload(request: Request, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Upload a file to train with: purpose `fine-tune`. The reply means that it is on the disk."""
    tenant, limit = serving.caller.tenant, desk.settings.max_file_bytes
    desk.admission.check()
    desk.places.check(tenant)
    with desk.spool.arriving(request, tenant) as arriving:
        async with (
            received(arriving, desk.upload_directory, limit) as arrived,
            desk.place(tenant, arriving),
        ):
            found = await desk.slowly(_keep, serving.jobs.files, arrived)
    return JSONResponse(view(found))


@router.get("", responses={200: {"model": FileList}, **openai_refusals(404, 422, 503)})
@needs("train")
async def list_files(
    serving: ServingDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> JSONResponse:
    """The files, the newest first."""
    look = partial(serving.jobs.files.list, after=after, limit=limit, order=order, purpose=purpose)
    found, more = await asyncio.to_thread(look)
    return JSONResponse(listed([view(one) for one in found], more))


@router.get("/{file_id}", responses={200: {"model": FileView}, **openai_refusals(404, 422, 503)})
@needs("train")
async def show(file_id: PathName, serving: ServingDep) -> JSONResponse:
    """One file."""
    return JSONResponse(view(await asyncio.to_thread(serving.jobs.files.get, file_id)))


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        **openai_refusals(404, 422, 503),
    },
)
@needs("train")
async def content(file_id: PathName, serving: ServingDep) -> FileResponse:
    """Its bytes."""
    file = await asyncio.to_thread(serving.jobs.files.get, file_id)
    path = await asyncio.to_thread(serving.jobs.files.path, file)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete(
    "/{file_id}", responses={200: {"model": FileDeleted}, **openai_refusals(404, 422, 503)}
)
@needs("train")
async def delete(file_id: PathName, desk: DeskDep, serving: ServingDep) -> JSONResponse:
    """Delete a file. Jobs that were made of it keep what they need."""
    await desk.slowly(serving.jobs.files.delete, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def view(file: TrainingFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.nbytes,
        "created_at": int(file.created),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256,
    }


def listed(views: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page as OpenAI's lists have it."""
    return {
        "object": "list",
        "data": views,
        "has_more": more,
        "first_id": views[0]["id"] if views else None,
        "last_id": views[-1]["id"] if views else None,
    }


def _keep(files: TrainingFiles, arrived: Arrived) -> TrainingFile:
    return files.add(
        arrived.path,
        filename=arrived.filename,
        purpose=PURPOSE,
        suffix=arrived.suffix,
        nbytes=arrived.nbytes,
        sha256=arrived.sha256,
    )
