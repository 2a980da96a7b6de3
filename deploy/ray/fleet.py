"""What a fleet is made of: its numbers, and the settings that its processes share."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.access.keys import opened
from service.config import SECRETS, ConfigError, Configuration, Settings, configure

Flags = Mapping[str, Any]  # settings that were given by name; the rest comes from variables


class Fleet(BaseModel):
    """How many processes, and what each may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(1, ge=1, le=4096, description="Replicas, or the fewest of them.")
    max_replicas: int | None = Field(
        None, ge=1, le=4096, description="The most, for Ray to choose by load; fixed when unset."
    )
    busy: float | None = Field(
        None, gt=0, description="Requests of a replica at which another is started."
    )
    cpus: float = Field(1.0, gt=0, le=1024, description="Cores of a replica, and its threads.")
    gpus: float = Field(0.0, ge=0, le=16, description="GPUs of a replica.")
    ingresses: int = Field(1, ge=1, le=256, description="Processes that callers meet.")
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65000,
        description="Where a node's first replica shows /metrics; the next takes the next port.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Fleet:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than {self.replicas}")
        return self

    @property
    def several(self) -> bool:
        return max(self.replicas, self.max_replicas or 1) > 1


def given(configuration: Configuration) -> dict[str, Any]:
    """What has to be told to a process elsewhere: all but secrets and what variables say, which
    every node brings itself."""
    told = ("flag", "file")
    return {
        name: getattr(configuration.settings, name)
        for name, source in configuration.sources.items()
        if source in told and name not in SECRETS
    }


def check_closed(settings: Settings) -> None:
    """Callers are not let in without keys, unless only this machine reaches the fleet, or `open`
    says so. Raises ConfigError, StoreUnavailable."""
    if settings.local or settings.open or settings.admin_key is not None:
        return
    with opened(settings) as keys:
        if keys.any():
            return
    raise ConfigError(
        "the fleet can be reached from outside and there are no keys yet: make one with `nibble "
        "keys create first --scopes admin`, set NIBBLE_ADMIN_KEY on every node, or, behind a "
        "gateway that checks, set open"
    )


def ingress_settings(flags: Flags) -> Settings:
    return configure(flags).settings


def replica_settings(flags: Flags, home: Path) -> Settings:
    """Catalog, blobs and collections are the fleet's; the home, with its audit log and its copies
    of blobs, is the replica's. Jobs would belong to one replica, so none are taken."""
    fleet = configure(flags).settings
    shared = {name: getattr(fleet, name) for name in ("catalog", "blobs", "collections")}
    return configure({**flags, **shared, "home": home, "fine_tuning": False}).settings


def claim(root: Path) -> tuple[Path, int, int]:
    """A home that no other replica of this node has: `replica-0`, or the next that is free. It is
    this process's while the descriptor is open. Home, number, descriptor."""
    for number in itertools.count():
        home = root.expanduser() / f"replica-{number}"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = os.open(home / "claimed", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
        else:
            return home, number, held
    raise AssertionError("unreachable")
