"""A stand-in for llama.cpp's `llama-server`: its flags and HTTP API as its README has them.

    GET  /health      503 while the model loads, then 200
    POST /completion  server-sent events, a token each; the last has `"stop": true` and no token

Run as a program by the tests. It refuses what the real one would: unknown flags, files that are not
there, adapters that were not loaded, prompts that are not ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loras = 0
    ready_at = 0.0
    seen: Path

    def do_GET(self) -> None:
        loading = time.monotonic() < self.ready_at
        body = b'{"error": {"code": 503}}' if loading else b'{"status": "ok"}'
        self._head(503 if loading else 200, "application/json", len(body))
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.seen.open("a") as file:
            file.write(json.dumps({"path": self.path, **body}) + "\n")
        wrong = any(lora["id"] >= self.loras for lora in body["lora"])
        if self.path != "/completion" or wrong or not all(type(i) is int for i in body["prompt"]):
            reply = b'{"error": {"code": 400, "message": "Invalid request"}}'
            self._head(400, "application/json", len(reply))
            self.wfile.write(reply)
            return
        self._head(200, "text/event-stream", None)
        for number in range(body["n_predict"]):
            self._event({"content": f"t{number}", "tokens": [number], "stop": False})
        self._event({"content": "", "tokens": [], "stop": True, "stop_type": "limit"})
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: object) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        time.sleep(0.002)

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests read what was asked from the file."""


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("model", "host", "cache-ram"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in ("port", "threads", "threads-batch", "parallel", "ctx-size"):
        parser.add_argument(f"--{flag}", required=True, type=int)
    parser.add_argument("--lora", default="")
    parser.add_argument("--lora-init-without-apply", action="store_true")
    given = parser.parse_args()
    loras = [Path(path) for path in given.lora.split(",") if path]
    for file in (Path(given.model), *loras):
        if file.read_bytes()[:4] != b"GGUF":
            sys.exit(f"error: failed to load {file}")
    Answer.loras, Answer.ready_at = len(loras), time.monotonic() + 0.2
    Answer.seen = Path(given.model).with_suffix(".asked")
    ThreadingHTTPServer((given.host, given.port), Answer).serve_forever()


if __name__ == "__main__":
    main()
