"""A training file's upload: multipart/form-data with `purpose` and `file`, as OpenAI's API has it,
straight from the socket to one temporary file, its sha-256 taken on the way."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from service.api.errors import Refused
from service.api.form import StreamedForm
from service.api.upload import PREFIX
from service.errors import InvalidRequest
from service.jobs.files import SUFFIXES

BUFFER_BYTES = 1 << 20
PURPOSE_BYTES = 64
MAX_NAME = 255  # characters
PURPOSE = "fine-tune"


@dataclass(frozen=True, slots=True)
class Arrived:
    """A file that is on the disk, and not kept yet."""

    path: Path
    filename: str
    suffix: str
    nbytes: int
    sha256: str


@asynccontextmanager
async def received(request: Request, directory: Path, max_bytes: int) -> AsyncIterator[Arrived]:
    """The upload in `request`; what is still in `directory` when the block ends is removed.

    Raises Refused (415 when it is no form, 413 when it is too large) and InvalidRequest.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        what = "an upload is multipart/form-data with the parts purpose and file"
        raise Refused(415, "unsupported_media", what)
    form = _Form(boundary, max_bytes)
    path = directory / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    try:
        hashed = hashlib.sha256()
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            async for piece in _pieces(request, form):
                await asyncio.to_thread(_write, file.fileno(), piece)
                hashed.update(piece)
            await asyncio.to_thread(os.fsync, file.fileno())
        yield form.result(path, hashed.hexdigest())
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


async def _pieces(request: Request, form: _Form) -> AsyncIterator[bytes]:
    """The file's bytes as they come."""
    try:
        async for chunk in request.stream():
            form.write(chunk)
            if len(form.content) >= BUFFER_BYTES:
                yield form.take()
        form.finish()
        form.check()
    except FormParserError as error:
        raise InvalidRequest(f"the body is not multipart/form-data: {error}") from None
    except ClientDisconnect:
        raise Refused(499, "cancelled", "the client went before the upload was complete") from None
    yield form.take()


def _write(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:  # a write may be short, on a full disk for one
        view = view[os.write(descriptor, view) :]


class _Form(StreamedForm):
    """Keeps the purpose, passes the file on."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self.content = bytearray()  # of the file, not taken yet
        self._purpose = bytearray()
        self._filename = ""
        self._nbytes = 0
        self._max_bytes = max_bytes
        super().__init__(boundary, ("purpose", "file"), "file and purpose")

    def take(self) -> bytes:
        piece, self.content = bytes(self.content), bytearray()
        return piece

    def check(self) -> None:
        """Raise InvalidRequest for what is not there, or not meant."""
        self.require(("purpose", "file"))
        if self._purpose != PURPOSE.encode():
            given = self._purpose.decode(errors="replace")
            raise InvalidRequest(f"purpose: {PURPOSE!r} is what is kept (got {given!r})", "purpose")
        if not self._nbytes:
            raise InvalidRequest("file: it is empty", "file")

    def result(self, path: Path, sha256: str) -> Arrived:
        return Arrived(path, self._filename, _suffix(self._filename), self._nbytes, sha256)

    def opened(self, part: str, options: Mapping[bytes, bytes]) -> None:
        if part == "file":
            self._filename = _shown(options.get(b"filename", b""))
            _suffix(self._filename)  # refused before its bytes come

    def arrived(self, part: str, data: bytes) -> None:
        if part == "purpose":
            self._purpose += data
            if len(self._purpose) > PURPOSE_BYTES:
                raise InvalidRequest(f"purpose: at most {PURPOSE_BYTES} bytes", "purpose")
            return
        self.content += data
        self._nbytes += len(data)
        if self._nbytes > self._max_bytes:
            what = f"file may have at most {self._max_bytes} bytes; more arrived"
            raise Refused(413, "too_large", what, "file")


def _shown(raw: bytes) -> str:
    """A client's name for its file, to be shown again: its last part, without control signs."""
    name = raw.decode("utf-8", errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(sign for sign in name if sign.isprintable())[-MAX_NAME:]


def _suffix(filename: str) -> str:
    """The format, from the name. Raises InvalidRequest."""
    found = next((one for one in SUFFIXES if filename.lower().endswith(one)), None)
    if found is None:
        what = f"file: a name that ends in {', '.join(SUFFIXES)} is needed (got {filename[:80]!r})"
        raise InvalidRequest(what, "file")
    return found
