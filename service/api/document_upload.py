"""Files of documents in a form: written to the disk as they arrive, named by their owner."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from service.api.errors import Refused
from service.api.upload import PREFIX
from service.errors import InvalidRequest

MAX_FILES = 1000
MAX_METADATA = 64 << 10  # bytes
MAX_NAME = 512
PIECE = 1 << 20

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "array",
                            "maxItems": MAX_FILES,
                            "items": {"type": "string", "format": "binary"},
                            "description": "One or more files; a file's name is its document's id",
                        },
                        "metadata": {
                            "type": "string",
                            "description": "A JSON object, for each of the files",
                        },
                    },
                }
            }
        },
    }
}


@dataclass(slots=True)
class DocumentUpload:
    """Files on this disk by the names that their owner gave, and metadata for all of them."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def remove(self) -> None:
        for _, path in self.files:
            with suppress(OSError):
                path.unlink(missing_ok=True)


async def received(request: Request, directory: Path) -> DocumentUpload:
    """The files of a form, in `directory` until they are removed.

    Raises Refused (415 when it is no form, 499 when the client went) and InvalidRequest.
    """
    kind, _ = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise Refused(
            415,
            "unsupported_media",
            "files come as multipart/form-data in parts named file; texts as JSON to /documents",
        )
    upload = DocumentUpload()
    try:
        async with request.form(
            max_files=MAX_FILES, max_fields=1, max_part_size=MAX_METADATA
        ) as form:
            for name, value in form.multi_items():
                if name == "file" and isinstance(value, UploadFile):
                    await _keep(value, directory, upload)
                elif name == "metadata" and isinstance(value, str):
                    upload.metadata = _metadata(value)
                else:
                    raise InvalidRequest(
                        f"there is no part {name[:80]!r}; known are file, which has a filename, "
                        "and metadata, which has none",
                        name[:80],
                    )
    except ClientDisconnect:
        upload.remove()
        raise Refused(499, "cancelled", "the client went before the upload was complete") from None
    except MultiPartException as error:
        upload.remove()
        raise InvalidRequest(f"the body is not multipart/form-data: {error.message}") from None
    except BaseException as error:
        upload.remove()
        detail = getattr(error, "detail", None)  # how the framework says the same
        if isinstance(detail, str) and getattr(error, "status_code", 0) == 400:
            raise InvalidRequest(f"the body is not multipart/form-data: {detail}") from None
        raise
    if not upload.files:
        raise InvalidRequest("the part 'file' is missing", "file")
    return upload


async def _keep(file: UploadFile, directory: Path, upload: DocumentUpload) -> None:
    name = file.filename or ""
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidRequest(f"a file's name should have 1 to {MAX_NAME} characters", "file")
    # The name is only an id and a format; where the bytes lie is ours to say.
    path = directory / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    upload.files.append((name, path))
    with os.fdopen(descriptor, "wb") as target:
        while piece := await file.read(PIECE):
            await asyncio.to_thread(target.write, piece)


def _metadata(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"is not JSON: {error}", "metadata") from None
    if not isinstance(found, dict):
        raise InvalidRequest("should be a JSON object", "metadata")
    return found
