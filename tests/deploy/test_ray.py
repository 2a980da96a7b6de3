"""Two replicas on Ray Serve, on this machine: what callers see when one dies, and who gets what."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service.replicas import CIPHER, OPERATOR, ask, until, upload

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STARTING = 400.0
LENGTH: dict[str, Any] = {"max_new_tokens": 400, "ignore_eos": True}
LONG = {"inputs": "Once there was ", "parameters": LENGTH}
LOST = "the replica that had this request is gone; send the request again"


class Cluster:
    """`python -m deploy.ray`, and what it started."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes], port: int, metrics: int):
        self.home, self.process, self.port, self.metrics = home, process, port, metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = OPERATOR) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def replicas(self) -> dict[int, psutil.Process]:
        """Number of its home -> process."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                for file in process.open_files():
                    path = Path(file.path)
                    if path.name == "claimed" and self.home in path.parents:
                        found[int(path.parent.name.removeprefix("replica-"))] = process
            except psutil.Error:
                continue
        return found

    def served(self) -> Mapping[str, set[int]]:
        """Digest -> the replicas that served it, by their audit logs."""
        found = defaultdict(set)
        for path in self.home.glob("replica-*/audit/*"):
            if path.is_file() and path.name != "lock":
                number = int(path.parts[-3].removeprefix("replica-"))
                for line in path.read_text().splitlines():
                    said = json.loads(line)
                    if said["action"] == "POST /generate" and said.get("digest"):
                        found[said["digest"]].add(number)
        return found

    def busy(self) -> int | None:
        """The number of a replica that generates."""
        name = "vllm:num_requests_running"
        return next((number for number in self.replicas() if self.figure(number, name)), None)

    def figure(self, number: int, name: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.metrics + number}/metrics", timeout=60).text
        found = (line.split()[-1] for line in text.splitlines() if line.startswith(f"{name}{{"))
        return sum(map(float, found))

    def ready(self, count: int = 2) -> None:
        """So many replicas that answer."""

        def there() -> bool:
            found = self.replicas()
            try:
                for number in found:
                    httpx.get(f"http://127.0.0.1:{self.metrics + number}/ready").raise_for_status()
            except httpx.HTTPError:
                return False
            return len(found) == count

        until(there, STARTING)


def _free(count: int = 1) -> int:
    """The first of some ports in a row that nobody has."""
    while True:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            first: int = probe.getsockname()[1]
        if first + count < 65000 and all(_is_free(first + n) for n in range(count)):
            return first


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def started(home: Path, *flags: str) -> Iterator[Cluster]:
    """Until it serves; SIGTERM ends it, with status 0."""
    port, metrics = _free(), _free(8)
    command = [
        *(sys.executable, "-m", "deploy.ray", "--home", str(home)),
        *("--port", str(port), "--metrics-port", str(metrics), "--kv-cache-bytes", "32MiB"),
        *("--log-format", "json", "--drain-seconds", "5", *flags),
    ]
    log = home / "log"
    environment = {**os.environ, "NIBBLE_ADMIN_KEY": OPERATOR}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=sink)
        try:
            until(lambda: "serving on" in log.read_text() or process.poll() is not None, STARTING)
            assert process.poll() is None, log.read_text()[-4000:]
            yield Cluster(home, process, port, metrics)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(120) == 0
            finally:
                process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("fleet"), "--replicas", "2") as found:
        found.ready()
        yield found


@pytest.fixture
def both(cluster: Cluster) -> Iterator[httpx.Client]:
    """Both replicas are well, whatever a test before has done."""
    cluster.ready()
    with cluster.client() as found:
        yield found


def test_nothing_listens_beyond_this_machine(cluster: Cluster, both: httpx.Client) -> None:
    assert ask(both, "cipher").status_code == 200
    open_to_others = set()
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        for each in process.net_connections("inet"):
            here = each.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1")
            if each.status == psutil.CONN_LISTEN and not here:
                open_to_others.add((process.name(), each.laddr))
    assert not open_to_others


def test_the_same_api(cluster: Cluster, both: httpx.Client) -> None:
    uploaded = upload(both, "letters", CIPHER)
    served = ask(both, "letters")
    assert served.headers["x-adapter-digest"] == uploaded["digest"]
    assert len(served.headers.get_list("x-request-id")) == 1
    body = {"model": "letters", "messages": [{"role": "user", "content": "Encode: a fox"}]}
    whole = both.post("/v1/chat/completions", json={**body, "temperature": 0}).json()
    told, events = "", 0
    streamed = {**body, "temperature": 0, "stream": True}
    with both.stream("POST", "/v1/chat/completions", json=streamed) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                told += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                events += 1
    assert told == whole["choices"][0]["message"]["content"]
    summed = ask(both, "letters:0.5,cipher:0.5")
    assert summed.json()["generated_text"] == served.json()["generated_text"], "of equal parts"
    assert events > 2, "it came in pieces"
    assert both.delete("/adapters/letters").status_code == 200
    assert ask(both, "letters").status_code == 404
    assert both.get("/nowhere").status_code == 404
    assert both.post("/v1/files").status_code == 404, "jobs would belong to one replica"
    too_long = both.post("/generate", content=b"x" * (5 << 20))
    assert (too_long.status_code, too_long.json()["error_type"]) == (413, "too_large")


def test_keys_are_asked_for_before_any_replica(cluster: Cluster, both: httpx.Client) -> None:
    body = {"inputs": "x", "parameters": {"adapter_id": "cipher"}}
    unknown = httpx.post(f"{cluster.url}/generate", json=body)
    assert (unknown.status_code, unknown.json()["error_type"]) == (401, "invalid_api_key")
    made = both.post(
        "/keys", json={"name": "reads", "tenant": "other", "scopes": ["adapters:read"]}
    ).json()
    with cluster.client(made["key"]) as reader:
        assert reader.get("/adapters").json()["adapters"] == []
        refused = reader.post("/generate", json=body)
        assert (refused.status_code, refused.json()["error_type"]) == (403, "forbidden")
    log = cluster.home / "log"
    for name in (unknown.headers["x-request-id"], refused.headers["x-request-id"]):
        until(lambda name=name: name in log.read_text(), 10)  # type: ignore[misc]
        (line,) = (line for line in log.read_text().splitlines() if name in line)
        assert "nibble:Ingress" in line, "no replica heard of it"
    noted = cluster.home / "ingress/audit"
    name = refused.headers["x-request-id"]
    until(lambda: any(name in path.read_text() for path in noted.glob("*[!k]")), 10)
    made = both.post(
        "/keys", json={"name": "infers", "tenant": "other", "scopes": ["infer"]}
    ).json()
    with cluster.client(made["key"]) as stranger:
        assert stranger.post("/generate", json=body).status_code == 404, "not this tenant's"


def test_an_adapter_stays_with_one_replica(cluster: Cluster, both: httpx.Client) -> None:
    """Sixteen of them, and the first requests for each come at once."""
    digests = {}
    for number in range(16):
        weights = _scaled(CIPHER, number)
        files = {"config": (CIPHER / "adapter_config.json").read_bytes(), "weights": weights}
        reply = both.post("/adapters", data={"name": f"many-{number}"}, files=files)
        assert reply.status_code == 201, reply.text
        digests[reply.json()["digest"]] = f"many-{number}"
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda name: ask(both, name), [*digests.values()] * 4))
    assert {reply.status_code for reply in replies} == {200}
    until(lambda: len(digests.keys() - cluster.served().keys()) == 0, 10)
    homes = {digest: cluster.served()[digest] for digest in digests}
    assert all(len(numbers) == 1 for numbers in homes.values()), homes
    assert {number for numbers in homes.values() for number in numbers} == {0, 1}


def _scaled(sample: Path, number: int) -> bytes:
    from safetensors.numpy import load_file, save

    tensors = load_file(sample / "adapter_model.safetensors")
    return save({name: value * (1 - number / 100) for name, value in tensors.items()})


@pytest.mark.parametrize("skin", ["/generate_stream", "/v1/completions"])
def test_a_stream_says_that_its_replica_died(
    cluster: Cluster, both: httpx.Client, skin: str
) -> None:
    openai = skin.startswith("/v1")
    body: dict[str, Any] = {"inputs": "Once", "parameters": {**LENGTH, "adapter_id": "tickets"}}
    if openai:
        body = {"model": "tickets", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
        body["stream"] = True
    events: list[dict[str, Any]] = []
    with both.stream("POST", skin, json=body) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                if len(events) == 3:
                    cluster.replicas()[cluster.busy()].kill()
    said = events[-1]["error"]
    assert (said["message"] if openai else said) == LOST
    if not openai:
        assert events[-1]["request_id"] == stream.headers["x-request-id"]
    assert ask(both, "tickets").status_code == 200, "by the other one"


def test_what_was_not_answered_yet_is_asked_of_another(
    cluster: Cluster, both: httpx.Client
) -> None:
    """A whole reply has its first byte when it is done; until then its replica may die."""
    body = {**LONG, "parameters": {**LENGTH, "adapter_id": "cipher"}}
    undisturbed = both.post("/generate", json=body)
    assert undisturbed.status_code == 200, undisturbed.text
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(both.post, "/generate", json=body) for _ in range(4)]
        until(lambda: cluster.busy() is not None, 10)
        cluster.replicas()[cluster.busy()].kill()
        found = [reply.result() for reply in replies]
    assert [reply.status_code for reply in found] == [200] * 4
    assert {reply.json()["generated_text"] for reply in found} == {
        undisturbed.json()["generated_text"]
    }
    assert '"asked": 1' in (cluster.home / "log").read_text(), "one was lost"


def test_an_upload_is_not_repeated(cluster: Cluster, both: httpx.Client) -> None:
    """It may have been kept: the client is told, and decides."""
    files = {
        "config": (CIPHER / "adapter_config.json").read_bytes(),
        "weights": (CIPHER / "adapter_model.safetensors").read_bytes(),
    }
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(both.post, "/adapters", data={"name": "lost"}, files=files)
        staged = cluster.home / "blobs/tmp"
        until(lambda: any(staged.iterdir()), 10)
        for process in cluster.replicas().values():
            process.kill()
        refused = reply.result()
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"] == LOST
    assert refused.headers["retry-after"]


def test_a_client_that_goes_frees_its_place(cluster: Cluster, both: httpx.Client) -> None:
    """Sixteen answers of 400 tokens are not computed to their end."""
    numbers = list(cluster.replicas())

    def total(name: str) -> float:
        return sum(cluster.figure(number, name) for number in numbers)

    generated = "vllm:generation_tokens_total"
    before = total(generated)
    body = {"model": "cipher", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    with both.stream("POST", "/v1/completions", json={**body, "n": 16, "stream": True}) as stream:
        next(stream.iter_lines())
    until(lambda: total("vllm:num_requests_running") == 0, 60)
    assert total(generated) - before < 16 * 400 / 2


def test_another_replica_comes_with_the_load(tmp_path: Path) -> None:
    """And what neither of them nor the queue has room for is refused, with the time to wait."""
    flags = ("--replicas", "1", "--max-replicas", "2", "--busy", "2")
    with started(tmp_path, *flags, "--max-num-seqs", "2", "--max-queue", "4") as cluster:
        assert len(cluster.replicas()) == 1
        body = {**LONG, "parameters": LENGTH}
        found: list[httpx.Response] = []

        there = threading.Event()

        def keep_asking() -> None:
            with cluster.client() as client:
                while not there.is_set():
                    found.append(client.post("/generate", json=body))
                    there.wait(1)

        with ThreadPoolExecutor(16) as pool:
            askers = [pool.submit(keep_asking) for _ in range(16)]
            try:
                while len(cluster.replicas()) < 2:
                    assert not there.wait(1)
            finally:
                there.set()
            for asker in askers:
                asker.result()
        assert {reply.status_code for reply in found} == {200, 503}
        full = next(reply for reply in found if reply.status_code == 503)
        assert full.json()["error_type"] == "overloaded", full.text
        assert full.headers["retry-after"]
        cluster.ready()
