"""What a training job is, and which states follow which. No torch here.

validating_files -> queued -> running -> succeeded | failed | cancelled
                         \\      |
                          paused       (and back to queued)
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass
from typing import Literal

from adapters.manifest import DEFAULT_TENANT
from service.jobs.order import Order

Status = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
Asked = Literal["cancel", "pause"]
STATUSES: tuple[Status, ...] = (
    "validating_files",
    "queued",
    "running",
    "paused",
    "succeeded",
    "failed",
    "cancelled",
)
ENDED: frozenset[Status] = frozenset(("succeeded", "failed", "cancelled"))
JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a job failed, for programs and for people; `param` is the field to blame."""

    code: str
    message: str
    param: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Job:
    """One job as its row has it. Times are in seconds since the epoch."""

    id: str
    status: Status
    created: float
    order: Order
    asked: Asked | None = None
    finished: float | None = None
    starts: int = 0  # of its process since it last got on
    checked: Checked | None = None
    error: Fault | None = None
    adapter: str | None = None  # name@version, once published
    trained_tokens: int | None = None
    result_file: str | None = None
    tenant: str = DEFAULT_TENANT

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def over(self) -> bool:
        """It ended, and cannot be resumed: it needs its data no more."""
        return self.ended and (self.status != "failed" or self.checked is None)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check found: the config as it will run, and how much there is to learn from."""

    config: dict[str, object]
    examples: int
    tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def new_job_id() -> str:
    return f"ftjob-{secrets.token_hex(12)}"
