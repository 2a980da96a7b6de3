"""What the routes need, by name: the parts of the running server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, Protocol, TypeVar

from fastapi import Depends, Request

from adapters.limits import Limits
from adapters.store import AdapterStore, Probe
from base.spec import BaseSpec
from service.access.audit import AuditLog
from service.access.caller import LOCAL, Caller
from service.access.gate import Gate
from service.access.quotas import Lease, Meter
from service.admission import Admission
from service.api.errors import Refused
from service.api.places import Places
from service.api.spool import Spool
from service.api.threads import Threads
from service.config import Settings
from service.engine.observer import StepReport
from service.engine.request import AdapterRef
from service.engine.request import Request as Generation
from service.engine.stream import EventStream
from service.experiments import Experiments
from service.grammars import Grammars
from service.jobs.office import Office
from service.metrics import Metrics
from service.prompt.assembly import Assembly
from service.prompt.templates import Templates
from service.retrieval.library import Library
from service.retrieval.rerank import Reranker
from service.selection import Sums
from service.tracing.trace import Tracing, Untraced

if TYPE_CHECKING:  # it brings torch, which is not here yet when the first request comes
    from service.residency.tiers import Resident

P = ParamSpec("P")
T = TypeVar("T")


class Report(Protocol):
    """What a load cost; `service.residency.tiers.LoadReport` is the real one."""

    @property
    def placement(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def notes(self) -> dict[str, float]: ...


class GenerationEngine(Protocol):
    """What HTTP asks of the engine; `service.engine.loop.Engine` is the real one."""

    max_model_len: int

    @property
    def alive(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    def waiting_of(self, tenant: str) -> int: ...
    def share_queue(self, when: Callable[[], bool]) -> None: ...
    def submit(self, request: Generation) -> EventStream: ...
    def reserved(self, ref: AdapterRef | None) -> AbstractContextManager[None]: ...
    def load(self, ref: AdapterRef) -> Report: ...
    def pin(self, ref: AdapterRef) -> None: ...
    def unpin(self, ref: AdapterRef) -> None: ...
    def forget(self, digest: str) -> None: ...
    def residents(self, digest: str | None = None) -> Sequence[Resident]: ...
    def stats(self) -> StepReport: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """Everything that exists once the base is loaded."""

    spec: BaseSpec
    dtype: str
    device: str
    precision: str  # of the products over NF4: exact or fast
    assembly: Assembly
    store: AdapterStore
    engine: GenerationEngine
    limits: Limits
    probe: Probe  # the last check of an upload: lower it, and run it over some tokens
    experiments: Experiments
    jobs: Office
    grammars: Grammars
    library: Library
    reranker: Reranker | None
    templates: Templates
    gate: Gate
    meter: Meter
    audit: AuditLog
    caller: Caller = LOCAL  # whoever asks: see `serving`
    lease: Lease | None = None  # what that one has reserved
    said: dict[str, Any] = field(default_factory=dict)  # for the request's line of the audit log
    sums: Sums = field(default_factory=Sums)

    def of(self, caller: Caller, lease: Lease | None, said: dict[str, Any]) -> Serving:
        """The same, where every name is one of the caller's tenant: a route cannot forget it."""
        return replace(
            self,
            caller=caller,
            lease=lease,
            said=said,
            store=self.store.of(caller.tenant),
            jobs=self.jobs.of(caller.tenant),
            templates=self.templates.of(caller.tenant),
        )


@dataclass(slots=True)
class Desk:
    """One application: what exists from the first moment, and `serving` once it is there."""

    settings: Settings
    admission: Admission
    metrics: Metrics
    places: Places
    spool: Spool
    upload_directory: Path
    slow: Threads  # apart, so that nothing slow ever stands before the look-ups of requests
    plans: Threads  # of training, which take a whole base: one at a time
    serving: Serving | None = None
    failure: str | None = None  # why it serves nothing: it could not start, or has no engine
    next_step: str = ""  # for whoever started it
    tracing: Tracing = field(default_factory=Untraced)

    @asynccontextmanager
    async def place(self, tenant: str, request: Request) -> AsyncIterator[None]:
        """A place for what came with `request`, unless its client goes while it waits. Raises
        Overloaded, Refused."""
        held = await unless_gone(request, self.places.take(tenant))
        try:
            yield
        finally:
            self.places.give_back(held)

    async def slowly(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run something slow in a thread, when it is the caller's turn. Not undone when the client
        goes."""
        return await self.slow.run(partial(work, *arguments, **named))


async def desk(request: Request) -> Desk:
    found: Desk = request.app.state.desk
    return found


def loaded(here: Desk) -> Serving:
    """The loaded parts. Raises Loading before they are there."""
    if here.serving is None:
        here.admission.check()
    assert here.serving is not None, "admission opens after serving is set"
    return here.serving


async def serving(request: Request) -> Serving:
    """The loaded parts, as this caller sees them. Raises Loading before they are there."""
    scope = request.scope
    return loaded(await desk(request)).of(scope["caller"], scope["lease"], scope["said"])


async def tenant(request: Request) -> str:
    """Whose things a request means: its key's tenant, and nothing that it says itself."""
    found: str = request.scope["caller"].tenant
    return found


DeskDep = Annotated[Desk, Depends(desk)]
ServingDep = Annotated[Serving, Depends(serving)]
TenantDep = Annotated[str, Depends(tenant)]


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client goes first, `work` is cancelled: raises Refused.

    Call it once the body has been read: what comes after it can only be the client's going.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "cancelled", "the client has gone")
        return await task
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
