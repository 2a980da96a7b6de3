"""The rendered container as processes: a rollout to the next version, and no request fails.

What a cluster does is done here by hand: probes until ready, then the old pod is told to stop,
while whoever routes requests goes on using it for a moment: endpoints are updated beside that.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.manifests import ROOT, only, rendered, secrets, variables

LAG = 1.5  # seconds until the last proxy has forgotten a pod that stops
COMMAND = {"nibble": [sys.executable, "-m", "service.cli"]}
SECRETS = {"nibble-admin": "a-key-of-the-operator-s-own"}
HEADERS = {"authorization": f"Bearer {SECRETS['nibble-admin']}"}
ASKED = {"inputs": "Once there was ", "parameters": {"max_new_tokens": 24}}


class Pod:
    """One rendered container as a process, with a port and a /data of its own."""

    def __init__(self, manifests: list[dict[str, Any]], data: Path) -> None:
        self.spec = only(manifests, "Deployment")["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        data.mkdir()
        given = {k: v.replace("/data", str(data)) for k, v in variables(self.container).items()}
        given |= {name: SECRETS[one["name"]] for name, one in secrets(self.container).items()}
        given |= {"NIBBLE_HOST": "127.0.0.1", "NIBBLE_PORT": str(port)}
        self.process = subprocess.Popen(
            [*COMMAND[self.container["command"][0]], *self.container["args"]],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            | given,
            cwd=data,
            stdout=subprocess.DEVNULL,
        )

    def passes(self, probe: str) -> bool:
        try:
            path = self.container[probe]["httpGet"]["path"]
            return httpx.get(self.url + path, timeout=10).is_success
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        until = time.monotonic() + 240
        while not self.passes("startupProbe"):
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < until
            time.sleep(0.5)
        assert self.passes("readinessProbe")
        assert self.passes("livenessProbe")

    def stop(self) -> int:
        """As the kubelet does it: preStop, SIGTERM, and SIGKILL after the grace period."""
        grace = self.spec["terminationGracePeriodSeconds"]
        begun = time.monotonic()
        subprocess.run(self.container["lifecycle"]["preStop"]["exec"]["command"], check=True)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(grace - (time.monotonic() - begun))


@pytest.mark.slow
def test_a_rollout_fails_no_request(tmp_path: Path) -> None:
    pods: list[Pod] = []
    endpoints: list[str] = []
    answers: list[int | str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                url = random.choice(endpoints)
                reply = httpx.post(f"{url}/generate", json=ASKED, headers=HEADERS, timeout=120)
                answers.append(reply.status_code)
            except httpx.HTTPError as error:
                answers.append(repr(error))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    try:
        for version in ("one", "two"):
            made = rendered(
                "--set=persistence.enabled=false,preStopSeconds=4,drainSeconds=60",
                f"--set=settings.served_names={version}",
            )
            pods.append(Pod(made, tmp_path / version))
            pods[-1].wait()
            endpoints.append(pods[-1].url)
            if version == "one":
                for client in clients:
                    client.start()
                time.sleep(2)
        old, new = pods
        before = len(answers)
        threading.Timer(LAG, endpoints.remove, [old.url]).start()
        assert old.stop() == 0
        time.sleep(2)
        ended.set()
        for client in clients:
            client.join(150)
        assert set(answers) == {200}, [one for one in answers if one != 200][:3]
        assert len(answers) > before > 0
        reply = httpx.post(
            f"{new.url}/v1/completions",
            json={"model": "two", "prompt": "Once", "max_tokens": 1},
            headers=HEADERS,
            timeout=60,
        )
        assert reply.is_success, reply.text
        assert httpx.post(f"{new.url}/generate", json=ASKED, timeout=60).status_code == 401
    finally:
        ended.set()
        for pod in pods:
            pod.process.kill()
            pod.process.wait()
