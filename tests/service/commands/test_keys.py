"""`nibble keys`, on a catalog without a server and on a running one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands import keys


def run(home: Path, *args: str, status: int = 0) -> str:
    done = CliRunner().invoke(keys.app, [*args, "--home", str(home)], env={"NIBBLE_URL": ""})
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


def test_the_life_of_a_key(tmp_path: Path) -> None:
    token = run(tmp_path, "create", "ci", "--scopes", "infer, rag", "--tenant", "acme").strip()
    assert token.startswith("nbl_")
    key_id = token.split("_")[1]
    listed = run(tmp_path, "list")
    assert key_id in listed
    assert "infer rag" in listed
    assert token.rpartition("_")[2] not in listed
    new = json.loads(run(tmp_path, "rotate", key_id, "--hours", "1", "--json"))
    assert f"now {new['id']}" in run(tmp_path, "list")
    assert "revoked" in run(tmp_path, "revoke", new["id"])
    states = {one["id"]: one["state"] for one in json.loads(run(tmp_path, "list", "--json"))}
    assert states == {key_id: "active", new["id"]: "revoked"}


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for field, wrong in (("scopes", "root"), ("days", "nan"), ("days", "-1"), ("tenant", "../a")):
        refused = run(tmp_path, "create", "ci", f"--{field}", wrong, status=2)
        assert refused.startswith(f"nibble: {field}: ")
        assert wrong in refused
        assert "keys list" not in refused
    missing = run(tmp_path, "revoke", "000000000000", status=1)
    assert "does not exist\n`nibble keys list`" in missing


def test_a_whole_key_stands_for_its_id_and_its_secret_goes_nowhere(tmp_path: Path) -> None:
    token = run(tmp_path, "create", "leaked").strip()
    assert "is revoked" in run(tmp_path, "revoke", token)
    unknown = f"nbl_{'0' * 12}_{'5' * 64}"
    for no_key in (unknown, f"'{unknown}'"):
        assert "555" not in run(tmp_path, "revoke", no_key, status=1)
    assert "555" not in "".join(path.read_text() for path in (tmp_path / "audit").glob("*.jsonl"))


def test_a_running_server_is_asked_with_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("authorization"))
            self.send_response(401)
            body = json.dumps({"error": "no", "error_type": "invalid_api_key"}).encode()
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("NIBBLE_API_KEY", "nbl_of_mine")
        url = f"http://127.0.0.1:{server.server_port}"
        done = CliRunner().invoke(keys.app, ["list", "--url", url])
    assert heard == ["Bearer nbl_of_mine"]
    assert done.exit_code == 1
    assert "NIBBLE_API_KEY" in done.stderr
