"""A cluster that is one machine keeps its ports to itself, and asks its processes for a token.

Ray's variables are read when it is imported, and every process of the cluster has them from the one
that started it.
"""

from __future__ import annotations

import inspect
import os
import secrets
import socket
from contextlib import ExitStack
from typing import Any

# Ray's switch for systems on which it has no clusters: its processes listen on loopback then.
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def set_variables() -> None:
    """For a cluster that this process is about to start."""
    os.environ.setdefault(CLUSTER, "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # How long its node and its agents look for each other: 30 s are few on a busy machine.
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")


def name_ports() -> None:
    """Ports for the agents of the node that this process is about to start.

    Ray's node waits 15 s, and no setting says longer, for an agent to write down the port that it
    found, and aborts; a busy machine takes longer to start one. For ports that it was told it waits
    for nobody.
    """
    from ray._private import services
    from ray._raylet import persist_port

    start = services.start_raylet
    listening = "dashboard_agent_listen_port"
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", listening)

    def with_ports(*args: Any, **given: Any) -> Any:
        asked = inspect.signature(start).bind(*args, **given).arguments
        asked |= zip(names, free_ports(len(names)), strict=True)
        # The one that it reads from the file, whoever told it.
        persist_port(asked["session_dir"], asked["node_id"], listening, asked[listening])
        return start(**asked)

    services.start_raylet = with_ports


def free_ports(count: int) -> list[int]:
    """On loopback; nobody had them a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def listen_on_loopback() -> None:
    """In a replica, before Serve opens its port for calls between deployments, which is on every
    address otherwise."""
    if os.environ.get(CLUSTER) != "0":
        return
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(
        server, address.replace("[::]", "127.0.0.1")
    )
