"""A cluster that is one machine keeps its ports to itself, and asks its processes for a token.

Ray's variables are read when it is imported, and every process of the cluster has them from the one
that started it.
"""

from __future__ import annotations

import os
import secrets

# Ray's switch for systems on which it has no clusters: its processes listen on loopback then.
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def set_variables() -> None:
    """For a cluster that this process is about to start."""
    os.environ.setdefault(CLUSTER, "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


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
