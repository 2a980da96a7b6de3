"""The chart: sensible values make manifests that a cluster takes, others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import OTHER_VARIABLES, PREFIX, Settings
from tests.deploy.manifests import (
    CHART,
    check_references,
    check_restricted,
    check_schema,
    front,
    helm,
    of_kind,
    only,
    pod_specs,
    rendered,
    secrets,
    server,
    variables,
)
from training.config import TrainConfig

GATEWAY = ("--values", str(CHART / "examples" / "gateway.yaml"))  # on top of the fleet's
EXAMPLES = sorted(path for path in (CHART / "examples").glob("*.yaml") if path.stem != "gateway")
FROM = "networkPolicy.from[0].namespaceSelector.matchLabels.name=ingress"
SCRAPED = "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring"
SHARED = (
    "--set=store.blobs=s3://adapters/prod,store.catalogSecret.name=catalog,"
    "persistence.enabled=false,networkPolicy.egress[0].ports[0].port=5432"
)
MATRIX = {
    "defaults": (),
    "gpu": ("--set=gpu.enabled=true,gpu.runtimeClass=nvidia,settings.kv_cache_bytes=4GiB",),
    "ephemeral": ("--set=persistence.enabled=false,networkPolicy.enabled=false",),
    "claim": ("--set=persistence.existingClaim=mine,image.digest=sha256:" + "a" * 64,),
    "ingress": (
        "--set=ingress.enabled=true,ingress.checkedBy=oauth2-proxy,ingress.host=n.example.org,"
        f"ingress.className=haproxy,ingress.tlsSecret=tls,ingress.annotations.a/b=c,{FROM}",
    ),
    "replicas": (SHARED, "--set=replicas=3,migration.enabled=false"),
    "open": (
        "--set=keys.open=true,ingress.enabled=true,ingress.host=a.b,ingress.checkedBy=x,"
        f"ingress.tlsBy=aws-alb,{FROM}",
    ),
    "keda": (SHARED, f"--set=autoscaling.kind=keda,serviceMonitor.enabled=true,{SCRAPED}"),
    "hpa": (SHARED, "--set=autoscaling.kind=hpa,envSecrets={s3},podDisruptionBudget.enabled=false"),
    "placement": (
        "--set=nodeSelector.disk=ssd,image.pullSecrets={regcred},podLabels.team=a,"
        "podAnnotations.b=c,topologySpread=false,serviceMonitor.enabled=true,"
        f"serviceMonitor.labels.release=p,drainSeconds=900,preStopSeconds=30,{SCRAPED}",
    ),
    "training": (
        "--set=training[0].name=a,training[0].config.data.train=/input/a.jsonl,"
        "training[0].input.claim=in,training[0].publish.name=a,training[1].name=b,"
        "training[1].config.data.train=/data/b.jsonl,training[1].gpu=true,"
        "training[1].output.claim=out",
    ),
    "identity": (
        SHARED,
        "--set=serviceAccount.create=true,serviceAccount.annotations.a/b=c,priorityClass=high,"
        "rollout.maxSurge=0,rollout.maxUnavailable=25%,replicas=4",
    ),
    "gateway": ("--values", str(CHART / "examples" / "fleet.yaml"), *GATEWAY),
    **{path.stem: ("--values", str(path)) for path in EXAMPLES},
}


@pytest.fixture(params=MATRIX, scope="module")
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(*MATRIX[request.param])


def test_parts_fit_together(manifests: list[dict[str, Any]]) -> None:
    check_references(manifests)
    for pod in pod_specs(manifests):
        check_restricted(pod)
        for container in pod["containers"]:
            variables(container)
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(names) == len(set(names))


def test_a_cluster_takes_them(manifests: list[dict[str, Any]]) -> None:
    for one in manifests:
        check_schema(one)


def test_the_server_takes_its_variables(manifests: list[dict[str, Any]], tmp_path: Path) -> None:
    (container,) = server(manifests)["spec"]["template"]["spec"]["containers"]
    ours = {k: v for k, v in variables(container).items() if k.startswith(PREFIX)}
    assert not set(ours) & OTHER_VARIABLES
    settings = Settings(**{k.removeprefix(PREFIX).lower(): v for k, v in ours.items()})
    (port,) = container["ports"]
    assert settings.port == port["containerPort"]
    assert settings.host == "0.0.0.0"


def test_grace_is_longer_than_the_longest_generation(manifests: list[dict[str, Any]]) -> None:
    pod = server(manifests)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = float(variables(container)["NIBBLE_DRAIN_SECONDS"])
    sleep = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # After the drain a server has 2 s for cancelled replies, and closes its store.
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + 10
    # Proxies learn from the readiness probe or from the end of the pod: both before SIGTERM's 503.
    assert sleep >= 1


def test_it_stays_inside(manifests: list[dict[str, Any]]) -> None:
    assert front(manifests)["spec"]["type"] == "ClusterIP"
    assert {one["spec"].get("type", "ClusterIP") for one in of_kind(manifests, "Service")} == {
        "ClusterIP"
    }
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule.get("from") for rule in policy["spec"].get("ingress", []))
    (container,) = server(manifests)["spec"]["template"]["spec"]["containers"]
    first = {"name": "nibble-admin", "key": "key"}
    if variables(container).get("NIBBLE_OPEN") == "true":
        for ingress in of_kind(manifests, "Ingress"):
            assert ingress["metadata"]["annotations"]["nibble/checked-by"]
    else:
        assert secrets(container)["NIBBLE_ADMIN_KEY"] == first


def test_probes_ask_routes_that_are_there(manifests: list[dict[str, Any]]) -> None:
    from service.api.meta import router

    routes = {route.path for route in router.routes}  # type: ignore[attr-defined]
    (container,) = server(manifests)["spec"]["template"]["spec"]["containers"]
    asked = {
        name: container[name]["httpGet"]["path"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert asked["livenessProbe"] == "/health", "a server that stops or loads is alive"
    assert set(asked.values()) <= routes
    for monitor in of_kind(manifests, "ServiceMonitor"):
        assert {one["path"] for one in monitor["spec"]["endpoints"]} <= routes


def test_runs_are_ones_that_the_trainer_takes(manifests: list[dict[str, Any]]) -> None:
    jobs = [one for one in of_kind(manifests, "Job") if "-train-" in one["metadata"]["name"]]
    configs = [one for one in of_kind(manifests, "ConfigMap") if "run.yaml" in one["data"]]
    assert len(jobs) == len(configs)
    for one in configs:
        run = TrainConfig.model_validate(yaml.safe_load(one["data"]["run.yaml"]))
        if run.publish is not None:
            service = front(manifests)
            port = service["spec"]["ports"][0]["port"]
            assert run.publish.url == f"http://{service['metadata']['name']}:{port}"


def test_a_volume_of_its_own_is_never_shared_by_two_servers() -> None:
    alone = server(rendered())["spec"]
    assert (alone["replicas"], alone["strategy"]["type"]) == (1, "Recreate")
    fleet = server(rendered(SHARED, "--set=replicas=3"))["spec"]
    assert fleet["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_fleet_takes_no_training_over_http() -> None:
    fleet = rendered(*MATRIX["fleet"])
    (container,) = server(fleet)["spec"]["template"]["spec"]["containers"]
    assert variables(container)["NIBBLE_FINE_TUNING"] == "false", "a job would live on one pod"


def test_the_catalog_is_migrated_once_before_servers_start() -> None:
    job = only(rendered(SHARED), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert not of_kind(rendered(), "Job"), "a catalog on the pod's volume is the pod's business"


def test_gpus_are_limits_of_servers_and_jobs_that_ask() -> None:
    made = rendered(*MATRIX["gpu"], *MATRIX["training"])
    (container,) = server(made)["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert variables(container)["NIBBLE_DEVICE"] == "cuda"
    first, second = (pod["containers"][0] for pod in pod_specs(of_kind(made, "Job")))
    assert "nvidia.com/gpu" not in first["resources"]["limits"]
    assert second["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("replicas=2", "several replicas need one store"),
        ("autoscaling.kind=keda", "several replicas need one store"),
        (f"{SHARED[6:]},replicas=2,persistence.enabled=true", "cannot share a ReadWriteOnce"),
        ("autoscaling.minReplicas=9", "minReplicas (9) is more than maxReplicas (8)"),
        ("store.catalog=postgresql://h/d,store.catalogSecret.name=s", "are both set"),
        ("store.catalog=postgresql://u:secret@h/d", "store/catalog"),
        ("settings.port=9", "the chart sets it"),
        ("settings.max_num_seq=9", "max_num_seq"),
        ("settings.admin_key=aaaaaaaaaaaaaaaaaaaa", "it is a secret"),
        ("ingress.enabled=true,keys.open=true,ingress.host=a.b", "name in ingress.checkedBy"),
        ("ingress.enabled=true,ingress.host=a.b", "ingress.enabled without TLS"),
        (
            "ingress.enabled=true,ingress.host=a.b,ingress.tlsSecret=t",
            "where the ingress controller's pods are",
        ),
        ("serviceMonitor.enabled=true", "where Prometheus' pods are"),
        ("store.blobs=s3://a/b", "say in networkPolicy.egress where"),
        ("gateway.enabled=true", "set gateway.parent.name"),
        ("gateway.enabled=true,gateway.parent.name=g", "where the gateway's pods are"),
        (
            "gateway.enabled=true,gateway.parent.name=g,networkPolicy.enabled=false,"
            "settings.protect_metrics=true",
            "reads /metrics without a key",
        ),
        ("gateway.rewrites[0].name=a,gateway.rewrites[0].model=a", "gateway/rewrites/0"),
        ("store.blobs=s3://a/b,persistence.enabled=false", "one half of the store would be lost"),
        (
            "store.catalogSecret.name=c,persistence.enabled=false",
            "one half of the store would be lost",
        ),
        ("rollout.maxSurge=0", "both 0: no pod could ever be replaced"),
        ("keys.admin.name=", "keys/admin/name"),
        ("settings.open=true", "the chart sets it"),
        ("ingress.enabled=true,ingress.checkedBy=x", "ingress/host"),
        ("service.type=LoadBalancer", "additional properties 'type' not allowed"),
        ("replica=2", "additional properties 'replica' not allowed"),
        ("drainSeconds=0", "drainSeconds"),
        ("drainSeconds=4000", "drainSeconds"),
        ("image.tag=a b", "image/tag"),
        ("persistence.size=20 GB", "persistence/size"),
        ("training[0].name=a", "training/0"),
    ],
)
def test_what_would_go_wrong_is_refused(values: str, said: str) -> None:
    done = helm("template", "nibble", str(CHART), "--set", values)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "")
def test_lint(values: Path | None) -> None:
    given = ("--values", str(values)) if values else ()
    done = helm("lint", "--strict", str(CHART), *given)
    assert done.returncode == 0, done.stdout + done.stderr


def test_who_installs_it_is_told_of_the_first_key() -> None:
    told = {
        values: helm("install", "--dry-run=client", "x", str(CHART), f"--set={values}").stdout
        for values in ("keys.admin.name=mine", "keys.open=true")
    }
    assert "create secret generic mine --from-literal=key=" in told["keys.admin.name=mine"]
    assert "whoever reaches it" not in told["keys.admin.name=mine"]
    assert "whoever reaches it can generate" in told["keys.open=true"]


def test_prometheus_gets_the_key_where_metrics_want_one() -> None:
    monitor = f"--set=serviceMonitor.enabled=true,keys.admin.name=mine,{SCRAPED}"
    (plain,) = only(rendered(monitor), "ServiceMonitor")["spec"]["endpoints"]
    assert "authorization" not in plain
    made = only(rendered(monitor, "--set=settings.protect_metrics=true"), "ServiceMonitor")
    check_schema(made)
    (endpoint,) = made["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "mine", "key": "key"}
    other = ("--set=settings.protect_metrics=true,keys.metrics.name=reads",)
    (endpoint,) = only(rendered(monitor, *other), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "reads"


def test_who_comes_from_outside_needs_a_key_for_the_metrics() -> None:
    def asked(*more: str) -> tuple[str | None, bool]:
        made = rendered(*MATRIX["ingress"], f"--set=serviceMonitor.enabled=true,{SCRAPED}", *more)
        (container,) = server(made)["spec"]["template"]["spec"]["containers"]
        (endpoint,) = only(made, "ServiceMonitor")["spec"]["endpoints"]
        return variables(container).get("NIBBLE_PROTECT_METRICS"), "authorization" in endpoint

    assert asked() == ("true", True)
    assert asked("--set=settings.protect_metrics=true") == ("true", True)
    assert asked("--set=settings.protect_metrics=false") == ("false", False)
    assert asked("--set=keys.open=true") == (None, False), "there is no key"


def test_as_many_threads_as_cores_were_asked_for() -> None:
    def threads(*values: str) -> list[str | None]:
        made = rendered(*MATRIX["training"], *values)
        containers = [pod["containers"][0] for pod in pod_specs(made)]
        return [
            next(
                (
                    one["valueFrom"]["resourceFieldRef"]["resource"]
                    for one in container["env"]
                    if one["name"] == "OMP_NUM_THREADS" and "valueFrom" in one
                ),
                None,
            )
            for container in containers
        ]

    assert threads() == ["requests.cpu"] * 3
    assert threads("--set-string=resources.limits.cpu=4") == ["limits.cpu"] * 3
    assert threads("--set=resources.requests.cpu=null") == [None] * 3
    assert threads("--set-string=env[0].name=OMP_NUM_THREADS,env[0].value=8") == [None] * 3
    many = threads("--set=training[1].processes=2")
    assert many == ["requests.cpu"] * 2 + [None], "accelerate's own"


def test_settings_are_the_server_s() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    known = schema["properties"]["settings"]["propertyNames"]["enum"]
    assert known == sorted(Settings.model_fields), "values.schema.json lists every setting"


def test_a_gateway_s_pool_is_the_servers_and_uploads_pass_by_it() -> None:
    made = rendered(*MATRIX["gateway"])
    pod = server(made)["spec"]["template"]
    pool = only(made, "InferencePool")["spec"]
    assert pool["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert pool["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    by_model, figures, rest = only(made, "HTTPRoute")["spec"]["rules"]
    from service.api.openai import chat, completions, embeddings

    routes = {
        route.path  # type: ignore[attr-defined]
        for module in (chat, completions, embeddings)
        for route in module.router.routes
    }
    assert {one["path"]["value"] for one in by_model["matches"]} == routes
    assert all(one["method"] == "POST" for one in by_model["matches"])
    assert figures["matches"] == [{"path": {"type": "Exact", "value": "/metrics"}}]
    assert "backendRefs" not in figures, "they name the adapters of all tenants"
    assert rest["backendRefs"][0]["name"] == front(made)["metadata"]["name"]
    assert "kind" not in rest["backendRefs"][0], "uploads go to the Service"
    (config,) = (one for one in of_kind(made, "ConfigMap") if "picker.yaml" in one["data"])
    picker = yaml.safe_load(config["data"]["picker.yaml"])
    known = {one["type"] for one in picker["plugins"]}
    (profile,) = picker["schedulingProfiles"]
    assert {one["pluginRef"] for one in profile["plugins"]} <= known
    assert "lora-affinity-scorer" in known


def test_the_picker_may_read_pods_and_pools_and_nothing_else() -> None:
    rules = only(rendered(*MATRIX["gateway"]), "Role")["rules"]
    assert all(set(rule["verbs"]) == {"get", "list", "watch"} for rule in rules)
    assert {each for rule in rules for each in rule["resources"]} == {
        *("pods", "inferencepools", "inferenceobjectives", "inferencemodelrewrites")
    }


def test_no_figure_is_not_a_figure_of_none() -> None:
    (trigger,) = only(rendered(*MATRIX["keda"]), "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "KEDA takes an empty answer for 0"


def test_a_base_that_loads_for_long_is_no_failed_rollout(
    manifests: list[dict[str, Any]],
) -> None:
    spec = server(manifests)["spec"]
    startup = spec["template"]["spec"]["containers"][0]["startupProbe"]
    allowed = startup["periodSeconds"] * startup["failureThreshold"]
    assert spec["progressDeadlineSeconds"] > allowed


def test_a_pod_that_keeps_all_on_its_node_asks_for_the_room() -> None:
    for way, asked in (("ephemeral", "20Gi"), ("defaults", None)):
        (container,) = server(rendered(*MATRIX[way]))["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["requests"].get("ephemeral-storage") == asked


def test_a_migration_has_a_policy_before_it_starts() -> None:
    made = rendered(SHARED)
    job = only(made, "Job")
    (policy,) = (
        one
        for one in of_kind(made, "NetworkPolicy")
        if one["metadata"]["name"] == job["metadata"]["name"]
    )
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert int(policy["metadata"]["annotations"]["helm.sh/hook-weight"]) < 0
    assert "ingress" not in policy["spec"], "nobody asks it"


def test_a_drained_node_is_no_failure_of_a_run() -> None:
    for job in of_kind(rendered(*MATRIX["training"]), "Job"):
        (rule,) = job["spec"]["podFailurePolicy"]["rules"]
        assert (rule["action"], rule["onPodConditions"]) == (
            "Ignore",
            [{"type": "DisruptionTarget", "status": "True"}],
        )
        assert job["spec"]["podReplacementPolicy"] == "Failed", "two would write one checkpoint"


def test_who_runs_it_can_be_said() -> None:
    made = rendered(*MATRIX["identity"], *MATRIX["training"])
    account = only(made, "ServiceAccount")
    assert account["metadata"]["annotations"] == {"a/b": "c"}
    assert account["automountServiceAccountToken"] is False
    pods = [
        one["spec"]["template"]["spec"]
        for one in (server(made), *of_kind(made, "Job"))
        if "-migrate" not in one["metadata"]["name"]
    ]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    assert {pod["priorityClassName"] for pod in pods} == {"high"}
    rolling = server(made)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": "25%"}


def test_jobs_that_publish_get_a_key() -> None:
    first, second = (
        pod["containers"][0] for pod in pod_specs(of_kind(rendered(*MATRIX["training"]), "Job"))
    )
    assert secrets(first)["NIBBLE_API_KEY"]["name"] == "nibble-admin"
    assert "NIBBLE_API_KEY" not in secrets(second), "it publishes nothing"
    made = rendered(*MATRIX["training"], "--set=keys.publish.name=publisher")
    (first, _) = (pod["containers"][0] for pod in pod_specs(of_kind(made, "Job")))
    assert secrets(first)["NIBBLE_API_KEY"] == {"name": "publisher", "key": "key"}
