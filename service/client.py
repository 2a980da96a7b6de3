"""A client of a running server, for the command line: generation and adapters over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from adapters import evaluation, origin

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_HUB_NAME = "adapter.safetensors"  # what AdapterHub calls the same file
TEMPLATE_NAME = "chat_template.jinja"
JOBS = "/v1/fine_tuning/jobs"
TOKENIZER_NAME = "tokenizer.json"
PAGE = 1000


class ClientError(Exception):
    """Base of what can go wrong between a client and its server."""


class ServerUnreachable(ClientError):
    """Nothing answers at this address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no server answers at {url} ({reason})")
        self.url = url


class ServerRefused(ClientError):
    """The server answered with an error; `body` is its envelope, when it was JSON, and `path` what
    was asked for."""

    def __init__(self, status: int, message: str, body: Any = None, path: str = "") -> None:
        super().__init__(f"{message} (HTTP {status})" if status else message)
        self.status = status
        self.body = body
        self.path = path

    @property
    def field(self) -> str | None:
        """Which field of the request is at fault, by the server's own envelope or OpenAI's."""
        if not isinstance(self.body, dict):
            return None
        error = self.body.get("error")
        found = error.get("param") if isinstance(error, dict) else self.body.get("field")
        return found if isinstance(found, str) else None


class AdapterDirectoryIncomplete(ClientError):
    """A directory lacks one of the two files that PEFT's `save_pretrained` writes."""

    def __init__(self, directory: Path, missing: str) -> None:
        super().__init__(
            f"{directory} has no {missing}; expected {CONFIG_NAME} and {WEIGHTS_NAME}, "
            "as PEFT's save_pretrained writes them"
        )


class Client:
    """Speaks to one server. Connecting is bounded by seconds; a generation is not."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(timeout, connect=5.0),
            transport=transport,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def generate(
        self, inputs: Any, parameters: dict[str, Any], retrieval: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """POST /generate: `inputs` is a text or a list of chat messages."""
        body = {"inputs": inputs, "parameters": parameters}
        if retrieval is not None:
            body["retrieval"] = retrieval
        found: dict[str, Any] = self._call("POST", "/generate", json=body)
        return found

    def stream(self, inputs: Any, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST /generate_stream: one event for each token; the last has `generated_text`."""
        body = {"inputs": inputs, "parameters": parameters}
        with (
            self._reaching(),
            self._http.stream("POST", "/generate_stream", json=body) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(response)
            for event in _events(response.iter_lines()):
                if "error" in event:
                    raise ServerRefused(0, _message(event), event)
                yield event

    def upload_file(self, path: Path) -> dict[str, Any]:
        """POST /v1/files: a file to train with, streamed from the disk."""
        with path.open("rb") as file:
            found: dict[str, Any] = self._call(
                "POST",
                "/v1/files",
                data={"purpose": "fine-tune"},
                files={"file": (path.name, file, "application/octet-stream")},
            )
        return found

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/fine_tuning/jobs; with `dry_run` its plan."""
        found: dict[str, Any] = self._call("POST", JOBS, json=body)
        return found

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        found: list[dict[str, Any]] = self._call("GET", JOBS, params={"limit": limit})["data"]
        return found

    def job(self, job_id: str, ask: str = "") -> dict[str, Any]:
        """One job; with `ask` cancel, pause, resume or publish, what it then is."""
        path = f"{JOBS}/{quote(job_id, safe='')}"
        found: dict[str, Any] = (
            self._call("POST", f"{path}/{ask}") if ask else self._call("GET", path)
        )
        return found

    def job_events(self, job_id: str, limit: int) -> list[dict[str, Any]]:
        """The last events of a job, oldest first."""
        path = f"{JOBS}/{quote(job_id, safe='')}/events"
        found: list[dict[str, Any]] = self._call("GET", path, params={"limit": limit})["data"]
        return found[::-1]

    def follow_job(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every event of a job, as it happens, until it ends."""
        path = f"{JOBS}/{quote(job_id, safe='')}/events"
        with (
            self._reaching(),
            self._http.stream("GET", path, params={"stream": "true"}) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(response)
            yield from _events(response.iter_lines())

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self._call("GET", "/info")
        return found

    def push(
        self,
        directory: Path,
        name: str,
        *,
        placement: str | None = None,
        merged_dtype: str | None = None,
    ) -> dict[str, Any]:
        """Upload what PEFT's `save_pretrained` or AdapterHub's `save_adapter` wrote as safetensors,
        and `chat_template.jinja`, `tokenizer.json`, `evaluation.json` and `training.json` if they
        are there.

        The weights are streamed from disk. Returns the server's description of the new version.
        """
        names = (WEIGHTS_NAME, ADAPTER_HUB_NAME)
        weights_name = next((n for n in names if (directory / n).is_file()), WEIGHTS_NAME)
        for required in (CONFIG_NAME, weights_name):
            if not (directory / required).is_file():
                raise AdapterDirectoryIncomplete(directory, required)
        fields = {"name": name, "placement": placement, "merged_dtype": merged_dtype}
        template = directory / TEMPLATE_NAME
        if template.is_file():
            fields["template"] = template.read_text(encoding="utf-8")
        with ExitStack() as stack:
            config = stack.enter_context((directory / CONFIG_NAME).open("rb"))
            weights = stack.enter_context((directory / weights_name).open("rb"))
            files = {
                "config": (CONFIG_NAME, config, "application/json"),
                "weights": (WEIGHTS_NAME, weights, "application/octet-stream"),
            }
            if (directory / TOKENIZER_NAME).is_file():
                tokenizer = stack.enter_context((directory / TOKENIZER_NAME).open("rb"))
                files["tokenizer"] = (TOKENIZER_NAME, tokenizer, "application/json")
            for part in (evaluation, origin):
                if (directory / part.FILE).is_file():
                    told = stack.enter_context((directory / part.FILE).open("rb"))
                    files[part.KEY] = (part.FILE, told, "application/json")
            found: dict[str, Any] = self._call(
                "POST",
                "/adapters",
                data={key: value for key, value in fields.items() if value is not None},
                files=files,
            )
        return found

    def adapters(self, resident: str | None = None) -> dict[str, list[dict[str, Any]]]:
        """All, page by page. `resident`: only those in this tier (slot, host, loading, store), or
        true or false."""
        asked = {} if resident is None else {"resident": resident}
        return self._pages("/adapters", "adapters", **asked)

    def adapter(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("GET", f"/adapters/{quote(name, safe='@:')}")
        return found

    def remove(self, name: str) -> Any:
        return self._call("DELETE", f"/adapters/{quote(name, safe='@:')}")

    def compose(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST /adapters/{name}/compose: a new version of `name`, made of stored adapters."""
        path = f"/adapters/{quote(name, safe='')}/compose"
        found: dict[str, Any] = self._call("POST", path, json=body)
        return found

    def set_alias(self, name: str, alias: str, version: int) -> Any:
        path = f"/adapters/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"
        return self._call("PUT", path, json={"version": version})

    def split_alias(self, name: str, alias: str, shares: dict[int, float]) -> Any:
        """Let an alias share its traffic: version -> weight."""
        path = f"/adapters/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"
        split = [{"version": version, "weight": weight} for version, weight in shares.items()]
        return self._call("PUT", path, json={"split": split})

    def experiment(self, name: str, alias: str) -> dict[str, Any]:
        path = f"/adapters/{quote(name, safe='')}/experiments/{quote(alias, safe='')}"
        found: dict[str, Any] = self._call("GET", path)
        return found

    def feedback(self, request_id: str, score: float, comment: str | None) -> dict[str, Any]:
        body = {"request_id": request_id, "score": score, "comment": comment}
        found: dict[str, Any] = self._call("POST", "/feedback", json=body)
        return found

    def drop_alias(self, name: str, alias: str) -> Any:
        path = f"/adapters/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"
        return self._call("DELETE", path)

    def push_template(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /templates: a new version of `body["name"]`."""
        found: dict[str, Any] = self._call("POST", "/templates", json=body)
        return found

    def templates(self) -> dict[str, Any]:
        """All, page by page."""
        return self._pages("/templates", "templates")

    def template(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("GET", f"/templates/{quote(name, safe='@')}")
        return found

    def diff_templates(self, name: str, before: int, after: int) -> dict[str, Any]:
        path = f"/templates/{quote(name, safe='')}/diff"
        found: dict[str, Any] = self._call("GET", path, params={"from": before, "to": after})
        return found

    def render_template(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST /templates/{name}/render: the exact text and token ids."""
        path = f"/templates/{quote(name, safe='@')}/render"
        found: dict[str, Any] = self._call("POST", path, json=body)
        return found

    def set_template_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        path = f"/templates/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"
        found: dict[str, Any] = self._call("PUT", path, json={"version": version})
        return found

    def drop_template_alias(self, name: str, alias: str) -> dict[str, Any]:
        path = f"/templates/{quote(name, safe='')}/aliases/{quote(alias, safe='')}"
        found: dict[str, Any] = self._call("DELETE", path)
        return found

    def remove_template(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("DELETE", f"/templates/{quote(name, safe='@')}")
        return found

    def create_collection(self, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._call("POST", "/collections", json=body)
        return found

    def collections(self) -> dict[str, Any]:
        """All, page by page."""
        return self._pages("/collections", "collections")

    def add_documents(self, name: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
        """POST /collections/{name}/documents: `{"id", "text", "metadata"}` each."""
        path = f"/collections/{quote(name, safe='')}/documents"
        found: dict[str, Any] = self._call("POST", path, json={"documents": documents})
        return found

    def add_files(
        self, name: str, files: list[tuple[str, Path]], metadata: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """POST /collections/{name}/files: one event for each step, the result with the last."""
        path = f"/collections/{quote(name, safe='')}/files"
        with ExitStack() as stack:
            parts = [
                ("file", (name, stack.enter_context(place.open("rb")))) for name, place in files
            ]
            response = stack.enter_context(
                self._reaching_stream(path, files=parts, data={"metadata": json.dumps(metadata)})
            )
            for event in _events(response.iter_lines()):
                if "error_type" in event:
                    raise ServerRefused(0, _message(event), event)
                yield event

    @contextmanager
    def _reaching_stream(self, path: str, **rest: Any) -> Iterator[httpx.Response]:
        accept = {"accept": "text/event-stream"}
        with (
            self._reaching(),
            self._http.stream("POST", path, headers=accept, **rest) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(response)
            yield response

    def search(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        path = f"/collections/{quote(name, safe='')}/search"
        found: dict[str, Any] = self._call("POST", path, json=body)
        return found

    def remove_documents(self, name: str, document: str | None = None) -> dict[str, Any]:
        """One document of a collection, or (None) the collection."""
        path = f"/collections/{quote(name, safe='')}"
        if document is not None:
            path += f"/documents/{quote(document, safe='/')}"
        found: dict[str, Any] = self._call("DELETE", path)
        return found

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /keys: a new API key; its text is in the reply, and nowhere else."""
        found: dict[str, Any] = self._call("POST", "/keys", json=body)
        return found

    def keys(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/keys")["keys"]
        return found

    def rotate_key(self, key_id: str, overlap_seconds: float) -> dict[str, Any]:
        path = f"/keys/{quote(key_id, safe='')}/rotate"
        body = {"overlap_seconds": overlap_seconds}
        found: dict[str, Any] = self._call("POST", path, json=body)
        return found

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("DELETE", f"/keys/{quote(key_id, safe='')}")
        return found

    def tenants(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/tenants")["tenants"]
        return found

    def set_quotas(self, tenant: str, body: dict[str, int]) -> dict[str, Any]:
        path = f"/tenants/{quote(tenant, safe='')}/quotas"
        found: dict[str, Any] = self._call("PUT", path, json=body)
        return found

    def share(self, kind: str, tenant: str, name: str, audience: list[str]) -> dict[str, Any]:
        path = f"/tenants/{quote(tenant, safe='')}/shares/{kind}/{quote(name, safe='')}"
        found: dict[str, Any] = self._call("PUT", path, json={"audience": audience})
        return found

    def shares(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/tenants/shares")["shares"]
        return found

    def _pages(self, path: str, key: str, **asked: Any) -> dict[str, list[dict[str, Any]]]:
        """A list by name, all of it."""
        found: list[dict[str, Any]] = []
        while True:
            after = {"after": found[-1]["name"]} if found else {}
            page = self._call("GET", path, params={"limit": PAGE, **asked, **after})
            found += page[key]
            if not page.get("has_more"):
                return {key: found}

    def _call(self, method: str, path: str, **rest: Any) -> Any:
        with self._reaching():
            response = self._http.request(method, path, **rest)
        if response.is_error:
            raise _refusal(response)
        if not response.content:
            return {}
        try:
            return response.json()
        except ValueError:
            raise ServerRefused(
                response.status_code, f"{self.url} does not answer like a nibble server"
            ) from None

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerUnreachable(self.url, str(error) or type(error).__name__) from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of every server-sent event; comments and other fields are skipped."""
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data and data != "[DONE]":
                yield json.loads(data)


def _refusal(response: httpx.Response) -> ServerRefused:
    path = response.request.url.path
    try:
        body = response.json()
    except ValueError:
        return ServerRefused(response.status_code, response.reason_phrase, None, path)
    message = _message(body) or response.reason_phrase
    return ServerRefused(response.status_code, message, body, path)


def _message(body: Any) -> str:
    """The text of the envelope `{"error": text, "error_type": …}`, or of OpenAI's."""
    said = body.get("error", "") if isinstance(body, dict) else ""
    return str(said.get("message", "")) if isinstance(said, dict) else str(said)
