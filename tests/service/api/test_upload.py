"""The upload's form: parsed as it comes, in whatever pieces, into one file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from adapters.limits import Limits
from service.api import upload
from service.api.errors import Refused
from service.api.upload import PREFIX, received, sweep
from service.errors import InvalidRequest

LIMITS = Limits(max_config_bytes=100, max_weights_bytes=5000, max_template_bytes=50)


def form(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"; filename="../../x"\r\n\r\n%s\r\n'
        % (name.encode(), value)
        for name, value in parts
    ) + (b"--b--\r\n")


GOOD = (("name", b"a"), ("weights", bytes(range(256)) * 10), ("config", b"{}"))


def receive(
    body: bytes,
    directory: Path,
    size: int = 10**6,
    look: Callable[[upload.Upload], Any] = lambda arrived: arrived.weights.read_bytes(),
) -> Any:
    pieces = [body[at : at + size] for at in range(0, len(body), size)] or [b""]

    async def give() -> dict[str, Any]:
        if not pieces:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def run() -> Any:
        scope = {
            "type": "http",
            "method": "POST",
            "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        }
        async with received(Request(scope, give), directory, LIMITS) as arrived:
            assert arrived.weights.parent == directory
            return look(arrived)

    try:
        return asyncio.run(run())
    finally:
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 10**6])
def test_any_cut_gives_the_same(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "BUFFER_BYTES", 100)
    assert receive(form(*GOOD), tmp_path, size) == GOOD[1][1]
    assert receive(form(*GOOD), tmp_path, size, lambda a: a.fields) == {
        "name": b"a",
        "config": b"{}",
    }


def test_the_file_is_private(tmp_path: Path) -> None:
    assert receive(form(*GOOD), tmp_path, look=lambda a: a.weights.stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize(
    ("parts", "error", "field"),
    [
        ((*GOOD, ("name", b"b")), InvalidRequest, "name"),
        ((*GOOD, ("weights", b"b")), InvalidRequest, "weights"),
        ((*GOOD, ("file", b"b")), InvalidRequest, "file"),
        ((*GOOD, ("", b"b")), InvalidRequest, ""),
        (GOOD[:2], InvalidRequest, "config"),
        (GOOD[1:], InvalidRequest, "name"),
        ((GOOD[0], GOOD[2]), InvalidRequest, "weights"),
        ((*GOOD[:2], ("config", b"x" * 101)), Refused, "config"),
        ((*GOOD, ("template", b"x" * 51)), Refused, "template"),
        ((("weights", b"x" * 5001), *GOOD[::2]), Refused, "weights"),
    ],
)
def test_parts_are_checked(tmp_path: Path, parts: Any, error: type[Exception], field: str) -> None:
    with pytest.raises(error) as refusal:
        receive(form(*parts), tmp_path, 16)
    assert refusal.value.field == field  # type: ignore[attr-defined]


@pytest.mark.parametrize("cut", [1, 20, 60, 500, len(form(*GOOD)) - 6])
def test_a_form_that_is_cut_off_is_no_upload(tmp_path: Path, cut: int) -> None:
    with pytest.raises(InvalidRequest, match=r"cut off|not multipart"):
        receive(form(*GOOD)[:cut], tmp_path)


def test_a_part_header_without_end_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not multipart"):
        receive(b"--b\r\nContent-Disposition: " + b"x" * 100_000, tmp_path, 4096)


def test_sweep_takes_the_files_of_the_dead(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for pid in (dead, str(os.getpid()), str(os.getppid()), "junk", "9" * 30):
        (tmp_path / f"{PREFIX}{pid}-0").touch()
    (tmp_path / "other").touch()
    composing = tmp_path / f"{PREFIX}{dead}-directory"
    composing.mkdir()
    (composing / "adapter_model.safetensors").touch()
    assert sweep(tmp_path) == 5
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"other", f"{PREFIX}{os.getppid()}-0"}
