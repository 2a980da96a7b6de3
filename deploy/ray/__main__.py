"""`python -m deploy.ray`: a fleet on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

import typer

from adapters.errors import AdapterError
from deploy.ray.fleet import Fleet, check_closed, given
from deploy.ray.loopback import name_ports, set_variables
from service.commands.flags import with_settings
from service.commands.output import fail
from service.config import ConfigError, Configuration

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STARTING = 300  # seconds that Ray's proxy may take; it says 60


@app.command()
@with_settings
def run(
    configuration: Configuration,
    replicas: Annotated[int, typer.Option(help="Replicas, or the fewest of them.")] = 2,
    max_replicas: Annotated[int | None, typer.Option(help="The most; Ray chooses by load.")] = None,
    busy: Annotated[float | None, typer.Option(help="Requests of one at which one more comes.")] = (
        None
    ),
    cpus: Annotated[float, typer.Option(help="Cores of a replica, and its threads.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs of a replica.")] = 0.0,
    ingresses: Annotated[int, typer.Option(help="Processes that callers meet.")] = 1,
    metrics_port: Annotated[int | None, typer.Option(help="Of the first replica.")] = None,
) -> None:
    """Serve one base and its adapters from several replicas, until SIGTERM or Ctrl-C."""
    try:
        fleet = Fleet(
            replicas=replicas,
            max_replicas=max_replicas,
            busy=busy,
            cpus=cpus,
            gpus=gpus,
            ingresses=ingresses,
            metrics_port=metrics_port,
        )
    except ValueError as error:
        fail(str(error), status=2)
    settings = configuration.settings
    try:
        check_closed(settings)
    except (ConfigError, AdapterError) as error:
        fail(str(error))
    if fleet.several and settings.quota_store.startswith("async+memory"):
        typer.echo("warning: each replica counts quotas by itself; see --quota-store", err=True)
    _connect(fleet)
    from ray import serve
    from ray.serve._private import api, client

    from deploy.ray.app import application

    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = STARTING
    serve.start(http_options={"host": settings.host, "port": settings.port})
    stopped = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopped.set())
    serve.run(application(given(configuration), fleet), name="nibble", route_prefix="/")
    typer.echo(f"serving on http://{settings.host}:{settings.port}")
    stopped.wait()
    serve.shutdown()


def _connect(fleet: Fleet) -> None:
    """A cluster of this machine listens on its own address only, has no dashboard, and asks its
    processes for a token."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or lines of ours that look alike are left out
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    os.environ.setdefault(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deploy.ray.proxy.middlewares"
    )
    # A proxy is a Python process: on a busy machine it is late, and not ill.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "30")
    if os.environ.get("RAY_ADDRESS"):
        import ray

        ray.init(log_to_driver=False)
        return
    set_variables()
    import ray  # reads its variables now

    name_ports()
    cores = fleet.cpus * max(fleet.replicas, fleet.max_replicas or 1)
    ray.init(
        num_cpus=int(cores) + 1,
        num_gpus=None if fleet.gpus else 0,
        include_dashboard=False,
    )


if __name__ == "__main__":
    app()
