"""Plain manifests: the base as it lies there, the overlays as kubectl makes them."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from service.config import PREFIX, Settings
from tests.deploy.manifests import (
    CHART,
    KUSTOMIZE,
    check_references,
    check_restricted,
    check_schema,
    of_kind,
    only,
    pod_specs,
    read,
    rendered,
    server,
    tool,
    variables,
)


def lying_there() -> list[dict[str, Any]]:
    files = read((KUSTOMIZE / "base" / "kustomization.yaml").read_text())[0]["resources"]
    assert set(files) | {"kustomization.yaml"} == {
        path.name for path in (KUSTOMIZE / "base").iterdir()
    }
    return [one for name in files for one in read((KUSTOMIZE / "base" / name).read_text())]


def built(where: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(KUSTOMIZE / where)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def check(manifests: list[dict[str, Any]]) -> None:
    check_references(manifests)
    for pod in pod_specs(manifests):
        check_restricted(pod)
    deployment = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = deployment["containers"]
    ours = {k: v for k, v in variables(container).items() if k.startswith(PREFIX)}
    settings = Settings(**{k.removeprefix(PREFIX).lower(): v for k, v in ours.items()})
    sleep = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert deployment["terminationGracePeriodSeconds"] >= sleep + settings.drain_seconds + 10
    assert only(manifests, "Service")["spec"]["type"] == "ClusterIP"
    claims = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    asked = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in deployment["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert asked == claims


def test_the_base_fits_together() -> None:
    check(lying_there())


@pytest.mark.parametrize("where", ["base", "overlays/gpu", "overlays/fleet"])
def test_what_kubectl_makes_fits_together(where: str) -> None:
    made = built(where)
    check(made)
    for one in made:
        check_schema(one)
    for pod in pod_specs(made):
        assert all(":0.1.0" in container["image"] for container in pod["containers"])


def test_the_pod_is_the_chart_s() -> None:
    whole = [only(made, "Deployment")["spec"] for made in (rendered(), lying_there())]
    chart, plain = (spec.pop("template")["spec"] for spec in whole)
    spread = "topologySpreadConstraints"  # selects by labels, and the chart has one more
    assert chart.pop(spread)[0]["topologyKey"] == plain.pop(spread)[0]["topologyKey"]
    assert plain == chart
    chart, plain = whole
    assert plain | {"selector": {}} == chart | {"selector": {}}


def test_gpu_and_fleet_change_what_they_say() -> None:
    (one,) = only(built("overlays/gpu"), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert one["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert variables(one)["NIBBLE_DEVICE"] == "cuda"
    fleet = built("overlays/fleet")
    deployment = only(fleet, "Deployment")["spec"]
    assert "replicas" not in deployment, "the autoscaler's"
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert only(fleet, "HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2
    (chart, plain) = (
        server(made)["spec"]["template"]["spec"]["containers"][0]["resources"]
        for made in (rendered("--values", str(CHART / "examples" / "fleet.yaml")), fleet)
    )
    assert plain == chart
