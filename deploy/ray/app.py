"""Nibble on Ray Serve.

    client -> Ray's HTTP proxy -> Ingress -> Replica, and as many more

`build` is what Ray's own tools take: `serve run deploy.ray.app:build replicas=2`, or the
`import_path` of a RayService.
"""

from __future__ import annotations

import math
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deploy.ray.fleet import Flags, Fleet, check_closed, ingress_settings
from deploy.ray.ingress import Ingress
from deploy.ray.replica import Replica
from deploy.ray.router import AdapterRouter

AT_AN_INGRESS = 4096  # requests; each waits for its replica, or for room in one
HEALTH_SECONDS = 5.0
SLACK_SECONDS = 5.0  # beyond the drain, until Ray kills


def build(args: dict[str, Any]) -> Application:
    """`args`: the fields of Fleet, and `settings`, a dict of those of the server. Secrets and what
    else differs by node come from every node's variables."""
    args = dict(args)
    # Where Ray's proxies listen is not said here; so this is taken to be reached from outside.
    flags = {"host": "0.0.0.0", **args.pop("settings", {})}
    check_closed(ingress_settings(flags))
    return application(flags, Fleet.model_validate(args))


def application(flags: Flags, fleet: Fleet) -> Application:
    """Raises ConfigError."""
    settings = ingress_settings(flags)
    drain = settings.drain_seconds
    replica = serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=settings.max_num_seqs,  # as many as one step takes
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        request_router_config=RequestRouterConfig(request_router_class=AdapterRouter),
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=drain + SLACK_SECONDS,
        **_scale(fleet, settings.max_num_seqs),
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=fleet.ingresses,
        max_ongoing_requests=AT_AN_INGRESS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain + SLACK_SECONDS,
    )
    return ingress.bind(replica.bind(dict(flags), fleet.metrics_port), dict(flags))


def _scale(fleet: Fleet, sequences: int) -> dict[str, Any]:
    if fleet.max_replicas is None or fleet.max_replicas == fleet.replicas:
        return {"num_replicas": fleet.replicas}
    busy = fleet.busy if fleet.busy is not None else math.ceil(sequences / 2)
    return {
        "autoscaling_config": {
            "min_replicas": fleet.replicas,
            "max_replicas": fleet.max_replicas,
            "target_ongoing_requests": busy,
        }
    }
