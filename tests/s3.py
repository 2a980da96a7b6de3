"""A bucket of the tests' own: moto's server, in a process beside them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

REGION = "us-east-1"


@contextmanager
def running(*buckets: str) -> Iterator[str]:
    """Its URL. Until the end the environment's variables lead there."""
    boto3 = pytest.importorskip("boto3", reason="make clients")
    pytest.importorskip("moto", reason="make clients")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            try:
                httpx.get(f"{url}/moto-api/")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (
                ("AWS_ENDPOINT", url),
                ("AWS_ALLOW_HTTP", "true"),
                ("AWS_ACCESS_KEY_ID", "test"),
                ("AWS_SECRET_ACCESS_KEY", "test"),
                ("AWS_REGION", REGION),
            ):
                patch.setenv(name, value)
            for bucket in buckets:
                boto3.client("s3", endpoint_url=url, region_name=REGION).create_bucket(
                    Bucket=bucket
                )
            yield url
    finally:
        process.terminate()
        process.wait(30)
