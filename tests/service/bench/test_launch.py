"""Servers in processes of their own: waited for, and a failure that says what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from service.bench.launch import ServerFailed, free_port, launched, nibble_address, token_times

SERVER = (
    "import http.server, sys\n"
    "class A(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers()\n"
    "    def do_POST(self):\n"
    "        self.send_response(200); self.end_headers()\n"
    "        self.wfile.write({answer!r})\n"
    "http.server.HTTPServer(('127.0.0.1', {port}), A).serve_forever()\n"
)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "raise SystemExit('no such base')"]
    with (
        pytest.raises(ServerFailed, match=r"\(status 1\): no such base"),
        launched(program, tmp_path / "log", lambda _: None, "/ready"),
    ):
        pass


def test_a_server_is_killed_and_its_stream_may_fail(tmp_path: Path) -> None:
    port = free_port()
    answer = b'data: {"n": 2}\n\ndata: {"error": "out of blocks"}\n\n'
    program = [sys.executable, "-c", SERVER.format(answer=answer, port=port)]
    url = f"http://127.0.0.1:{port}"
    with launched(program, tmp_path / "log", lambda _: url, "/health") as running:
        assert running.url == url
        assert 0 < running.seconds < 60
        with pytest.raises(ServerFailed, match="in its stream: out of blocks"):
            token_times(url, "/", {}, lambda event: int(event["n"]))
    assert not psutil.pid_exists(running.pid)


def test_the_address_is_read_from_the_log() -> None:
    assert nibble_address("starting") is None
    assert nibble_address('{"url": "http://127.0.0.1:80", "x": 1}') == "http://127.0.0.1:80"
