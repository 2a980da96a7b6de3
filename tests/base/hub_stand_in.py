"""A hub on 127.0.0.1 that speaks the few endpoints huggingface_hub's client asks for a snapshot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit


@dataclass
class Hub:
    """One repository with one commit, and what was asked of it."""

    repository: str
    directory: Path
    commit: str = "a" * 40
    branches: dict[str, str] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)  # files, in order
    url: str = ""

    def __post_init__(self) -> None:
        self.branches.setdefault("main", self.commit)

    def tree(self) -> list[dict[str, object]]:
        files = [f for f in sorted(self.directory.rglob("*")) if f.is_file()]
        return [
            {
                "type": "file",
                "path": str(f.relative_to(self.directory)),
                "size": f.stat().st_size,
                "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
            }
            for f in files
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`, until the block ends."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        api, tree = f"/api/models/{self.hub.repository}/", "tree/"
        if path.startswith(api + "revision/"):
            commit = self._commit(path.removeprefix(api + "revision/"))
            self._json(
                {"id": self.hub.repository, "sha": commit, "siblings": []} if commit else None
            )
        elif path.startswith(api + tree) and self._commit(path.removeprefix(api + tree)):
            self._json(self.hub.tree())
        else:
            self._file(path, body)

    def _commit(self, revision: str) -> str | None:
        return revision if revision == self.hub.commit else self.hub.branches.get(revision)

    def _file(self, path: str, body: bool) -> None:
        """/{repository}/resolve/{commit}/{file}"""
        prefix = f"/{self.hub.repository}/resolve/{self.hub.commit}/"
        file = self.hub.directory / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            self._json(None)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.hub.downloads.append(path.removeprefix(prefix))
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        content = json.dumps(value if value is not None else {"error": "not found"}).encode()
        self.send_response(200 if value is not None else 404)
        if value is None:
            known = f"/{self.hub.repository}/" in self.path
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""
