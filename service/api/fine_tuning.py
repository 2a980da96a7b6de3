"""Fine-tuning jobs over HTTP, in the shape of OpenAI's API, so that its SDK works unchanged.

What OpenAI has no word for is there beside it: pause, resume, publish, a plan instead of a job
(`dry_run`), the whole schema of `nibble train` (`config`), and events as they happen
(`stream=true`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from adapters.errors import InvalidTemplate
from service.access.caller import Scope
from service.api.access import Guarded, needs, open_to_all
from service.api.deps import Desk, DeskDep, Serving, ServingDep, unless_gone
from service.api.errors import Refused
from service.api.files import After, listed
from service.api.fine_tuning_schema import (
    CheckpointList,
    EventList,
    EventView,
    JobBody,
    JobList,
    JobView,
    PlanView,
    hyperparameters_of,
    order_of,
)
from service.api.openai_errors import openai_refusals
from service.api.sse import EventReply, events_of
from service.api.wire import PathName
from service.errors import InvalidRequest, NotFound
from service.jobs import progress
from service.jobs.history import Event
from service.jobs.job import Job, new_job_id
from service.jobs.office import Office, shown
from service.jobs.order import FileStamp, Order, TemplateStamp
from service.jobs.publication import check_name

REPLACES: Scope = "adapters:write"  # else a job adds versions only to what jobs have made
MAX_PAGE = 100
MAX_EVENTS = 1000
router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=Guarded)
_REFUSALS = openai_refusals(400, 404, 503)
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


@router.post(
    "",
    responses={
        200: {"model": JobView | PlanView},
        **openai_refusals(404, 408, 413, 415, 422, 429, 503, 507),
    },
)
@needs("train")
async def create(
    request: Request, body: JobBody, desk: DeskDep, serving: ServingDep
) -> JSONResponse:
    """Queue a job; with `dry_run`, say what it would do and cost. To take the place of an adapter
    that was uploaded under its name, the key needs the scope `adapters:write` too."""
    desk.admission.check()
    order = await asyncio.to_thread(_order, body, serving, desk)
    office, most = serving.jobs, _most_minutes(serving)
    if body.dry_run:
        plan = await unless_gone(request, desk.plans.run(partial(office.plan, order, most)))
        named = {"object": "fine_tuning.plan", "model": order.model, "method": _method(order, plan)}
        return JSONResponse({**named, **plan})
    job = await desk.slowly(office.create, order, most)
    return JSONResponse(_view(job, office))


@router.get("", responses={200: {"model": JobList}, **_REFUSALS})
@needs("train")
async def list_jobs(serving: ServingDep, after: After = None, limit: Limit = 20) -> JSONResponse:
    """The jobs, the newest first."""
    return JSONResponse(await asyncio.to_thread(_listed, serving.jobs, after, limit))


@router.get("/{job_id}", responses={200: {"model": JobView}, **_REFUSALS})
@needs("train")
async def show(job_id: PathName, serving: ServingDep) -> JSONResponse:
    """One job: its state, where it is, and why it failed where it did."""
    return await _of(serving, serving.jobs.queue.get, job_id)


@router.post("/{job_id}/cancel", responses={200: {"model": JobView}, **_REFUSALS})
@needs("train")
async def cancel(job_id: PathName, serving: ServingDep) -> JSONResponse:
    """Cancel a job. One that runs ends its step first."""
    return await _of(serving, serving.jobs.cancel, job_id)


@router.post("/{job_id}/pause", responses={200: {"model": JobView}, **_REFUSALS})
@needs("train")
async def pause(job_id: PathName, serving: ServingDep) -> JSONResponse:
    """Pause a job. One that runs writes a checkpoint first, and goes on from it bit for bit."""
    return await _of(serving, serving.jobs.pause, job_id)


@router.post("/{job_id}/resume", responses={200: {"model": JobView}, **_REFUSALS})
@needs("train")
async def resume(job_id: PathName, serving: ServingDep) -> JSONResponse:
    """Queue a paused job again, or one that failed once its data had been checked."""
    again = partial(serving.jobs.resume, most_minutes=_most_minutes(serving))
    return await _of(serving, again, job_id)


@router.post(
    "/{job_id}/publish",
    responses={200: {"model": JobView}, **openai_refusals(400, 404, 422, 503, 507)},
)
@needs("train")
async def publish(
    job_id: PathName, request: Request, desk: DeskDep, serving: ServingDep
) -> JSONResponse:
    """Serve the adapter of a job that succeeded with `publish` false: checked and tried as an
    upload is. One that is published stays as it is."""
    async with desk.place(serving.caller.tenant, request):
        replaces = serving.caller.may(REPLACES)
        job = await desk.slowly(partial(serving.jobs.publish, job_id, replaces=replaces))
    return await _of(serving, lambda _: job, job_id)


@router.get(
    "/{job_id}/events",
    response_class=JSONResponse,
    responses={200: {"model": EventList, "content": events_of(EventView)}, **_REFUSALS},
)
@needs("train")
async def events(
    job_id: PathName,
    serving: ServingDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 20,
    stream: Annotated[bool, Query(description="Server-sent events, until the job ends.")] = False,
) -> Response:
    """What happened to a job, the newest first; as a stream the oldest first, as it happens."""
    office = serving.jobs
    if stream:
        job = await asyncio.to_thread(office.queue.get, job_id)
        return EventReply(_told(office, job), lambda: None, {})
    found, more = await asyncio.to_thread(office.events, job_id, after, limit)
    return JSONResponse(listed([_event(one) for one in found], more))


@router.get("/{job_id}/checkpoints", responses={200: {"model": CheckpointList}, **_REFUSALS})
@needs("train")
async def checkpoints(
    job_id: PathName, serving: ServingDep, after: After = None, limit: Limit = 10
) -> JSONResponse:
    """The checkpoints of a job, the newest first. The last one is what it goes on from."""
    return JSONResponse(await asyncio.to_thread(_kept, serving.jobs, job_id, after, limit))


def _most_minutes(serving: Serving) -> int | None:
    """What the caller's tenant may train in thirty days."""
    return serving.lease.quotas.train_minutes if serving.lease else None


async def _of(serving: Serving, do: Callable[[str], Job], job_id: str) -> JSONResponse:
    """What a job is after `do`."""
    view = await asyncio.to_thread(lambda: _view(do(job_id), serving.jobs))
    return JSONResponse(view)


async def _told(office: Office, job: Job) -> AsyncIterator[dict[str, Any]]:
    async for event in office.follow(job):
        yield _event(event)


def _order(body: JobBody, serving: Serving, desk: Desk) -> Order:
    if body.model not in (desk.settings.base, serving.spec.id, *desk.settings.base_names):
        what = f"model {body.model[:80]!r} is not served here; {serving.spec.id!r} is"
        raise InvalidRequest(what, "model")
    training = _stamp(serving, body.training_file, "training_file")
    given = body.validation_file
    validation = None if given is None else _stamp(serving, given, "validation_file")
    template = None
    if body.template is not None:
        try:
            found = serving.templates.shelf.get(body.template)
        except InvalidTemplate as error:
            raise InvalidRequest(f"template: {error.reason}", "template") from error
        text = found.template.as_yaml()
        template = TemplateStamp(found.name, found.version, found.digest, text)
    order = order_of(body, training, validation, f"ft-{new_job_id()[-8:]}", template)
    order = replace(order, replaces=serving.caller.may(REPLACES))
    if order.publish:
        check_name(serving.store, order)
    return order


def _stamp(serving: Serving, file_id: str, param: str) -> FileStamp:
    files = serving.jobs.files
    try:
        found = files.get(file_id)
        files.path(found)
    except NotFound as error:
        raise NotFound(f"{param}: {error}", param) from None
    return FileStamp(found.id, found.filename, found.suffix, found.nbytes, found.sha256)


def _listed(office: Office, after: str | None, limit: int) -> dict[str, Any]:
    found, more = office.queue.newest(after, limit)
    return listed([_view(job, office) for job in found], more)


def _view(job: Job, office: Office) -> dict[str, Any]:
    order, at = job.order, progress.latest(office.directory(job))
    config = None if job.checked is None else shown(job.checked.config)
    steps = 0 if config is None else config["optim"]["steps"]
    finish = None
    if job.status == "running" and at is not None:
        finish = _estimate(office, job, at, steps)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": None if job.finished is None else int(job.finished),
        "estimated_finish": finish,
        "model": order.model,
        "fine_tuned_model": job.adapter,
        "organization_id": "nibble",
        "status": job.status,
        "error": None
        if job.error is None
        else {"code": job.error.code, "message": job.error.message, "param": job.error.param},
        "hyperparameters": hyperparameters_of(job),
        "method": _method(order, {"config": config}),
        "training_file": order.training.id,
        "validation_file": None if order.validation is None else order.validation.id,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": job.trained_tokens,
        "seed": order.seed,
        "metadata": dict(order.metadata),
        "integrations": [],
        "user_provided_suffix": order.suffix,
        "template": None if order.template is None else str(order.template),
        "publish": order.publish,
        "config": config,
        "progress": None
        if at is None
        else {"step": at.number, "steps": steps, "tokens": at.tokens, "train_loss": at.loss},
    }


def _estimate(office: Office, job: Job, at: progress.Step, steps: int) -> int | None:
    """When the last step ends, at the speed since this process started."""
    starts = progress.happened(office.directory(job), "started")
    if not starts or at.number <= starts[-1].data["step"]:
        return None
    each = (at.time - starts[-1].time) / (at.number - starts[-1].data["step"])
    return int(at.time + each * (steps - at.number))


def _method(order: Order, resolved: dict[str, Any]) -> dict[str, Any]:
    config = resolved.get("config") or order.config
    fields = {key: value for key, value in config.get("method", {}).items() if key != "kind"}
    return {"type": order.given_method, order.given_method: {"hyperparameters": fields}}


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def _kept(office: Office, job_id: str, after: str | None, limit: int) -> dict[str, Any]:
    job = office.queue.get(job_id)
    stem = "ftckpt-" + job.id.removeprefix("ftjob-")
    kept = office.checkpoints(job)
    last = kept[0][0].data["step"] if kept else None
    views = []
    for one, step in kept:
        number = one.data["step"]
        metrics: dict[str, float] = {"step": number}
        if step is not None:
            found = {"train_loss": step.loss, "valid_loss": step.eval_loss}
            metrics |= {name: loss for name, loss in found.items() if loss is not None}
        views.append(
            {
                "id": f"{stem}-{number}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(one.time),
                "fine_tuned_model_checkpoint": job.adapter if number == last else None,
                "fine_tuning_job_id": job.id,
                "step_number": number,
                "metrics": metrics,
            }
        )
    if after is not None:
        places = [i for i, view in enumerate(views) if view["id"] == after]
        if not places:
            raise NotFound(f"checkpoint {after[:80]!r} does not exist", "after")
        views = views[places[0] + 1 :]
    return listed(views[:limit], len(views) > limit)


# In place of all routes of training, where the setting `fine_tuning` is off.
off = APIRouter(route_class=Guarded)


async def refuse(rest: str = "") -> JSONResponse:
    raise Refused(
        404, "not_found", "this server takes no training jobs or files: fine_tuning is off here"
    )


for path in ("/v1/fine_tuning/{rest:path}", "/v1/files", "/v1/files/{rest:path}"):
    methods = ["GET", "POST", "DELETE"]
    off.add_api_route(path, open_to_all(refuse), methods=methods, include_in_schema=False)
