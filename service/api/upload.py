"""An adapter's upload: multipart/form-data, straight from the socket to one temporary file.

Nothing of the weights is kept in memory beyond one buffer, and the bound on the whole body holds
while it arrives (see `service.api.door`), whatever Content-Length said.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from adapters import evaluation, origin
from adapters.limits import Limits
from service.api.errors import Refused
from service.api.form import StreamedForm
from service.errors import InvalidRequest

BUFFER_BYTES = 1 << 20
# What boundaries, part headers, small fields and a tokenizer may add to the weights.
FORM_BYTES = 33 << 20
PREFIX = "upload-"
SMALL = ("name", "placement", "merged_dtype")
SMALL_BYTES = 256
REQUIRED = ("name", "config", "weights")


@dataclass(slots=True)
class Upload:
    """What arrived: the small parts as bytes, the weights as a file that is on the disk."""

    weights: Path
    fields: dict[str, bytes] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """A small part as text. Raises InvalidRequest when it is not UTF-8."""
        value = self.fields.get(name)
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name} is not UTF-8 at byte {error.start}", name) from None


@asynccontextmanager
async def received(request: Request, directory: Path, limits: Limits) -> AsyncIterator[Upload]:
    """The upload in `request`, its weights in `directory` until the block ends.

    Raises Refused (415 when it is no form, 413 when a part is too large) and InvalidRequest.
    """
    boundary = _boundary(request)
    path = directory / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            form = _Form(boundary, limits)
            await _read(request, form, file)
            await asyncio.to_thread(os.fsync, file.fileno())
        form.require(REQUIRED)
        yield Upload(path, {name: bytes(value) for name, value in form.small.items()})
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def sweep(directory: Path) -> int:
    """Remove what uploads of processes that are gone left behind; how many files."""
    swept = 0
    for path in directory.glob(f"{PREFIX}*"):
        if not _lives(path.name.removeprefix(PREFIX).partition("-")[0]):
            if path.is_dir():  # where an adapter was being composed
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            swept += 1
    return swept


def _lives(pid: str) -> bool:
    # Our own number on an old file is an earlier process: in a container all have the same one.
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Refused(
            415,
            "unsupported_media",
            "an upload is multipart/form-data with the parts name, config, weights and, if wanted, "
            "template, tokenizer, evaluation, training, placement, merged_dtype",
        )
    return boundary


async def _read(request: Request, form: _Form, file: BinaryIO) -> None:
    try:
        async for chunk in request.stream():
            form.write(chunk)
            if len(form.weights) >= BUFFER_BYTES:
                await _spill(form, file)
        form.finish()
    except FormParserError as error:
        raise InvalidRequest(f"the body is not multipart/form-data: {error}") from None
    except ClientDisconnect:
        raise Refused(499, "cancelled", "the client went before the upload was complete") from None
    await _spill(form, file)


async def _spill(form: _Form, file: BinaryIO) -> None:
    data, form.weights = form.weights, bytearray()
    view = memoryview(data)
    while view:
        view = view[await asyncio.to_thread(file.write, view) :]


class _Form(StreamedForm):
    """Keeps small parts, passes the weights on. A client's file names are never looked at."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.small: dict[str, bytearray] = {}
        self.weights = bytearray()  # not written yet
        self.weights_bytes = 0
        self._bounds = {
            **dict.fromkeys(SMALL, SMALL_BYTES),
            "config": limits.max_config_bytes,
            "template": limits.max_template_bytes,
            "tokenizer": limits.max_tokenizer_bytes,
            evaluation.KEY: evaluation.MAX_BYTES,
            origin.KEY: evaluation.MAX_BYTES,
            "weights": limits.max_weights_bytes,
        }
        super().__init__(boundary, self._bounds, ", ".join(sorted(self._bounds)))

    def opened(self, part: str, options: Mapping[bytes, bytes]) -> None:
        if part != "weights":
            self.small[part] = bytearray()

    def arrived(self, part: str, data: bytes) -> None:
        if part == "weights":
            self.weights += data
            self.weights_bytes += len(data)
            size = self.weights_bytes
        else:
            self.small[part] += data
            size = len(self.small[part])
        if size > self._bounds[part]:
            raise Refused(
                413,
                "too_large",
                f"{part} may have at most {self._bounds[part]} bytes; more arrived",
                part,
            )
