"""A real server with a real job: ended in order, killed, and each time started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.oracle import make_base

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 400.0
JOBS = "/v1/fine_tuning/jobs"
SERVE = (
    "import sys; from service.app import serve; from service.config import Settings; "
    "serve(Settings.model_validate_json(sys.argv[1]))"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Server:
    """A server of one home in a process of its own, as often as it is wanted."""

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.home = base, home
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client()

    def start(self) -> None:
        fields = {
            "base": str(self.base),
            "home": str(self.home / "home"),
            "port": 0,
            "adapters": None,
            "log_format": "json",
            "kv_cache_bytes": 4 << 20,
            "job_nice": 5,
        }
        log = self.home / "log"
        with log.open("wb") as sink:
            command = [sys.executable, "-c", SERVE, json.dumps(fields)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)

        def listening() -> str:
            lines = [line for line in log.read_text().splitlines() if '"listening"' in line]
            return str(json.loads(lines[0])["url"]) if lines else ""

        until(lambda: bool(listening()))
        self.client.close()
        self.client = httpx.Client(base_url=listening(), timeout=PATIENCE)
        until(lambda: self.client.get("/ready").status_code == 200)

    def training(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def job(self, job_id: str) -> Any:
        return self.client.get(f"{JOBS}/{job_id}").json()

    def step(self, job_id: str) -> int:
        at = self.job(job_id)["progress"]
        return int(at["step"]) if at else 0

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.client.close()
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(make_base(tmp_path / "tiny", "qwen3"), tmp_path)
    yield found
    found.client.close()
    if found.process is not None:
        found.process.kill()
        found.process.wait()


def test_a_job_outlives_its_server_bit_for_bit(server: Server) -> None:
    server.start()
    rows = "".join(
        json.dumps({"prompt": f"say {n}", "completion": f"word {n * 7}"}) + "\n" for n in range(64)
    )
    sent = server.client.post(
        "/v1/files",
        files={"file": ("rows.jsonl", rows.encode())},
        data={"purpose": "fine-tune"},
    ).json()
    body = {
        "model": "tiny",
        "training_file": sent["id"],
        "config": {
            "optim": {"steps": 400, "batch_size": 8},
            "method": {"dropout": 0.1},
            "checkpoint_every": 7,
        },
    }

    def create(name: str) -> str:
        return str(server.client.post(JOBS, json={**body, "suffix": name}).json()["id"])

    cut = create("cut")
    until(lambda: server.step(cut) > 3)

    # In order: the job ends its step, keeps a checkpoint, and goes on at the next start.
    assert server.end(signal.SIGTERM) == 0
    run = server.home / "home" / "jobs" / cut / "adapter" / "run"
    stopped_at = len((run / "log.jsonl").read_text().splitlines())
    assert 3 < stopped_at < 400
    server.start()
    until(lambda: server.step(cut) > stopped_at + 10)
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in starts if one["event"] == "started"] == [0, stopped_at]

    # Killed: the training dies with it, and goes on from the last checkpoint.
    trained_by = server.training()
    assert trained_by
    assert all(process.nice() >= 5 for process in trained_by)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    psutil.wait_procs(trained_by, timeout=30)
    assert not [process for process in trained_by if process.is_running()]
    server.start()
    until(lambda: server.job(cut)["status"] in ("succeeded", "failed"))
    assert server.job(cut)["status"] == "succeeded", server.job(cut)["error"]
    told = server.client.get(f"{JOBS}/{cut}/events", params={"limit": 1000}).json()["data"]
    assert any("server ended while it ran" in event["message"] for event in told)
    steps = [event["data"]["step"] for event in told if event["type"] == "metrics"]
    assert steps == list(range(400, 0, -1))

    # And it is the adapter that a run makes which nobody disturbs.
    whole = create("whole")
    until(lambda: server.job(whole)["status"] in ("succeeded", "failed"))
    digests = [server.client.get(f"/adapters/{n}").json()["digest"] for n in ("cut", "whole")]
    assert digests[0] == digests[1]
