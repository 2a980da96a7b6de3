"""The real application over one base, behind a real socket, in threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from adapters.manifest import AdapterManifest
from service.api.connection import connection_class
from service.api.deps import Desk, Serving
from service.app import create_app
from service.config import MIB, Settings
from service.engine.loop import Engine

_PATIENCE = 600  # seconds, for whatever must happen at all


class Live:
    """An application that has loaded its base, a client of it, and its engine."""

    def __init__(self, desk: Desk, client: httpx.Client) -> None:
        assert desk.serving is not None
        self.serving: Serving = desk.serving
        self.client = client
        found = self.serving.engine
        assert isinstance(found, Engine)
        self.engine: Engine = found

    def upload(self, name: str, adapter: Path) -> AdapterManifest:
        """What `save_pretrained` wrote, as anybody uploads it. Raises RuntimeError when refused."""
        config = (adapter / "adapter_config.json").read_bytes()
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        files = {"config": config, "weights": weights}
        if (adapter / "tokenizer.json").exists():
            files["tokenizer"] = (adapter / "tokenizer.json").read_bytes()
        reply = self.client.post("/adapters", data={"name": name}, files=files)
        if reply.status_code != 201:
            raise RuntimeError(f"the upload of {name} got {reply.status_code}: {reply.text[:400]}")
        return self.serving.store.resolve(f"sha256:{reply.json()['digest']}")

    def generate(self, name: str, text: str, tokens: int) -> tuple[list[int], list[int], str]:
        """Prompt and output as token ids, and the digest that the reply names; greedy."""
        parameters: dict[str, Any] = {
            "adapter_id": name,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "details": True,
            "decoder_input_details": True,
        }
        reply = self.client.post("/generate", json={"inputs": text, "parameters": parameters})
        if reply.status_code != 200:
            raise RuntimeError(f"{name} got {reply.status_code}: {reply.text[:400]}")
        details = reply.json()["details"]
        digest = reply.headers["x-adapter-digest"]
        return _ids(details["prefill"]), _ids(details["tokens"]), digest


def _ids(tokens: Sequence[dict[str, Any]]) -> list[int]:
    return [token["id"] for token in tokens]


@contextmanager
def live(base: Path, home: Path) -> Iterator[Live]:
    """Serve `base` in float32 on the CPU, with a store in `home`, until the block ends."""
    settings = Settings(
        base=str(base),
        home=home,
        adapters=None,
        port=0,
        device="cpu",
        dtype="float32",
        precision="exact",  # the fast kernels round activations to 8 bits
        kv_cache_bytes=32 * MIB,
        log_level="error",
    )
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        port=0,
        http=connection_class(64),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="nibble-conformance", daemon=True)
    thread.start()
    desk: Desk = app.state.desk
    try:
        _until(lambda: server.started and desk.admission.state in ("ready", "failed"), thread)
        if desk.failure is not None:
            raise RuntimeError(desk.failure)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=_PATIENCE) as client:
            yield Live(desk, client)
    finally:
        server.should_exit = True
        thread.join(_PATIENCE)


def _until(condition: Any, thread: threading.Thread) -> None:
    end = time.monotonic() + _PATIENCE
    while not condition():
        if not thread.is_alive() or time.monotonic() > end:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
