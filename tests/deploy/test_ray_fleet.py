"""What a fleet on Ray shares and what each of its replicas has for itself; without Ray."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deploy.ray.fleet import (
    Fleet,
    check_closed,
    claim,
    given,
    ingress_settings,
    replica_settings,
)
from deploy.ray.loopback import free_ports
from deploy.ray.proxy import OneId
from service.access.keys import opened
from service.config import ConfigError, configure
from tests.deploy.manifests import KUBERNETES, ROOT, variables


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("NIBBLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_a_replica_shares_the_store_and_has_a_home_of_its_own(tmp_path: Path) -> None:
    flags = {"home": tmp_path, "max_queue": 7}
    fleet = ingress_settings(flags)
    mine = replica_settings(flags, tmp_path / "replica-3")
    assert mine.home == tmp_path / "replica-3"
    for name in ("catalog", "blobs", "collections", "max_queue"):
        assert getattr(mine, name) == getattr(fleet, name), name
    assert not mine.fine_tuning, "a job would belong to one of them"


def test_a_home_is_claimed_by_one_and_free_again(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    assert [(home.name, number) for home, number, _ in (first, second)] == [
        ("replica-0", 0),
        ("replica-1", 1),
    ]
    os.close(first[2])  # as the death of its process would
    again = claim(tmp_path)
    assert again[1] == 0
    for _, _, held in (second, again):
        os.close(held)


def test_no_secret_is_told_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_ADMIN_KEY", "a key of some length")
    monkeypatch.setenv("NIBBLE_CATALOG", "postgresql://nibble:secret@db/nibble")
    file = tmp_path / "nibble.toml"
    file.write_text('admin_key = "another key of some length"\nmax_rank = 8\n')
    monkeypatch.delenv("NIBBLE_ADMIN_KEY")
    assert given(configure({"max_queue": 7}, file)) == {"max_queue": 7, "max_rank": 8}


def test_who_is_reached_from_outside_wants_keys(tmp_path: Path) -> None:
    outside = {"home": tmp_path, "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="there are no keys yet"):
        check_closed(ingress_settings(outside))
    check_closed(ingress_settings({**outside, "open": True}))
    check_closed(ingress_settings({**outside, "host": "127.0.0.1"}))
    with opened(ingress_settings(outside)) as keys:
        keys.create("first", "default", ["admin"])
    check_closed(ingress_settings(outside))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than 3"),
        ({"replica": 2}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_fleets_are_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Fleet.model_validate(fields)


def test_kuberay_s_pods_are_ones_that_a_cluster_takes() -> None:
    """And what it is told are fields of a fleet, and settings of a server."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())["spec"]
    (told,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    fleet = Fleet.model_validate({k: v for k, v in told["args"].items() if k != "settings"})
    assert fleet.several
    flags = {"catalog": "postgresql+psycopg://db/nibble", "blobs": "s3://bucket/prefix"}
    assert ingress_settings({**flags, **told["args"]["settings"]}).base == "mini"
    cluster = spec["rayClusterConfig"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for group in groups:
        pod = group["template"]["spec"]
        named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": pod}
        kubernetes_validate.validate(named, KUBERNETES, strict=True)
        (container,) = pod["containers"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        drain = float(variables(container)["NIBBLE_DRAIN_SECONDS"])
        assert pod["terminationGracePeriodSeconds"] >= drain + 20
        assert {"/data", "/tmp"} == {one["mountPath"] for one in container["volumeMounts"]}


def test_ray_is_told_ports_that_nobody_has() -> None:
    ports = free_ports(4)
    assert len(set(ports)) == 4
    for port in ports:
        with closing(socket.socket()) as mine:
            mine.bind(("127.0.0.1", port))


def test_a_reply_has_one_id() -> None:
    sent = []

    async def app(scope: object, receive: object, send: object) -> None:
        headers = [(b"x-request-id", b"ours"), (b"a", b"b"), (b"X-Request-ID", b"Ray's")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(OneId(app)({}, None, send))  # type: ignore[arg-type]
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-request-id", b"ours")]
