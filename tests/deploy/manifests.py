"""What the chart and kustomize make: reading it, and the checks that both have to pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "nibble"
KUSTOMIZE = ROOT / "deploy" / "kustomize"
KUBERNETES = "1.34.0"

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """The path of helm, kubectl or promtool; the test is skipped where it is not installed."""
    here = ROOT / ".tools" / name
    found = str(here) if here.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(
            f"{name} is not installed (`make deploy-tools` fetches helm, kubectl and promtool)"
        )
    return found


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm, without whatever repositories and plugins its user has."""
    nowhere = dict.fromkeys(
        ("HELM_CONFIG_HOME", "HELM_CACHE_HOME", "HELM_DATA_HOME"), "/nonexistent"
    )
    return subprocess.run(
        [tool("helm"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **nowhere},
    )


def rendered(*arguments: str, release: str = "nibble") -> list[Manifest]:
    """What `helm template` makes of the chart."""
    done = helm("template", release, str(CHART), "--namespace", "models", *arguments)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def read(text: str) -> list[Manifest]:
    return [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = of_kind(manifests, kind)
    return found


def server(manifests: list[Manifest]) -> Manifest:
    """The Deployment of the servers; a gateway's picker has one too."""
    (found,) = (
        one
        for one in of_kind(manifests, "Deployment")
        if one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "server"
    )
    return found


def front(manifests: list[Manifest]) -> Manifest:
    """The Service that clients ask; others name the pods of a run, or a gateway's picker."""
    (found,) = (
        one
        for one in of_kind(manifests, "Service")
        if one["spec"]["selector"].get("app.kubernetes.io/component") == "server"
    )
    return found


def pod_specs(manifests: list[Manifest]) -> Iterator[Manifest]:
    for one in manifests:
        if one["kind"] in ("Deployment", "Job"):
            yield one["spec"]["template"]["spec"]


def variables(container: Manifest) -> dict[str, str]:
    """The plain variables of a container, by name; twice the same name is an error."""
    names = [one["name"] for one in container.get("env", [])]
    assert len(names) == len(set(names)), f"set twice: {sorted(names)}"
    return {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}


def secrets(container: Manifest) -> dict[str, Manifest]:
    """Which Secret and which key of it each variable comes from."""
    return {
        one["name"]: one["valueFrom"]["secretKeyRef"]
        for one in container.get("env", [])
        if "secretKeyRef" in one.get("valueFrom", {})
    }


def check_schema(manifest: Manifest) -> None:
    """Strict: an unknown field is an error, of our custom resources too."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    group, _, version = manifest["apiVersion"].rpartition("/")
    for path in sorted(Path(__file__).with_name("crds").glob("*.json")):
        crd = json.loads(path.read_text())
        if (crd["group"], crd["version"], crd["kind"]) == (group, version, manifest["kind"]):
            import jsonschema

            jsonschema.validate(manifest, _closed(crd["schema"]))
            return
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def _closed(schema: Any) -> Any:
    """The API server drops unknown fields of a custom resource in silence: refuse them here."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(one) for name, one in schema.items()}
    if isinstance(schema.get("pattern"), str):  # Go takes flags anywhere, Python at the start
        closed["pattern"] = schema["pattern"].replace("^(?i)", "(?i)^")
    if schema.get("type") == "object" and "properties" in schema:
        closed.setdefault("additionalProperties", False)
    if closed.get("properties", {}).get("metadata") == {"type": "object"}:
        closed["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return closed


def check_references(manifests: list[Manifest]) -> None:
    """What names another part names one that is there."""
    pods = [
        one["spec"]["template"]["metadata"]["labels"] for one in of_kind(manifests, "Deployment")
    ]
    for job in of_kind(manifests, "Job"):  # what the cluster adds to the labels of its pods
        labels = job["spec"]["template"]["metadata"]["labels"]
        pods.append({**labels, "batch.kubernetes.io/job-name": job["metadata"]["name"]})
    for one in manifests:
        spec = one.get("spec", {})
        selector = {
            "Service": spec.get("selector"),
            "InferencePool": spec.get("selector", {}).get("matchLabels"),
            "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
            "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
        }.get(one["kind"])
        if one["kind"] == "Deployment":
            selector = spec["selector"]["matchLabels"]
        if selector is not None:
            found = any(selector.items() <= labels.items() for labels in pods)
            assert found, f"{one['kind']} selects no pod: {selector}"
    services = {one["metadata"]["name"] for one in of_kind(manifests, "Service")}
    for ingress in of_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                assert path["backend"]["service"]["name"] in services
    pools = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "InferencePool")}
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule.get("backendRefs", []):
                known = pools if backend.get("kind") == "InferencePool" else services
                assert backend["name"] in known
    for pool in pools.values():
        assert pool["endpointPickerRef"]["name"] in services
    for kind in ("InferenceObjective", "InferenceModelRewrite"):
        for one in of_kind(manifests, kind):
            assert one["spec"]["poolRef"]["name"] in pools
    accounts = {one["metadata"]["name"] for one in of_kind(manifests, "ServiceAccount")}
    for binding in of_kind(manifests, "RoleBinding"):
        assert {one["name"] for one in binding["subjects"]} <= accounts
        roles = {one["metadata"]["name"] for one in of_kind(manifests, binding["roleRef"]["kind"])}
        assert binding["roleRef"]["name"] in roles
    deployments = {one["metadata"]["name"] for one in of_kind(manifests, "Deployment")}
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for scaler in of_kind(manifests, kind):
            assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
    for pod in pod_specs(manifests):
        assert pod.get("subdomain") in {None, *services}
        volumes = {one["name"] for one in pod["volumes"]}
        for container in pod["containers"]:
            ports = {one["name"] for one in container.get("ports", [])}
            assert {one["name"] for one in container["volumeMounts"]} == volumes
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in ports


def check_restricted(pod: Manifest) -> None:
    """Kubernetes' Pod Security Standard `restricted`, a read-only root, and no token but for the
    picker of a gateway, which watches pods."""
    inside = pod["securityContext"]
    assert inside["runAsNonRoot"] is True
    assert inside["seccompProfile"] == {"type": "RuntimeDefault"}
    picker = [one["name"] for one in pod["containers"]] == ["picker"]
    assert inside["runAsUser"] == (65532 if picker else 10001)
    assert pod["automountServiceAccountToken"] is picker
    assert pod["enableServiceLinks"] is False, "a Service named nibble would set NIBBLE_PORT"
    assert not any("hostPath" in volume for volume in pod["volumes"])
    for container in pod["containers"]:
        limits = container["securityContext"]
        assert limits["allowPrivilegeEscalation"] is False
        assert limits["readOnlyRootFilesystem"] is True
        assert limits["capabilities"] == {"drop": ["ALL"]}
        mounted = {one["mountPath"] for one in container["volumeMounts"]}
        assert picker or {"/data", "/tmp"} <= mounted
