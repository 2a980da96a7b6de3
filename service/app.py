"""Assembly and lifespan: how the parts meet, in which order they start, and how they stop.

The application answers from its first moment (`/health`), while a thread loads the base; torch is
imported there too. SIGTERM: nothing new is admitted (503), what runs finishes, exit status 0.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI

from adapters.config_schema import other_scales
from adapters.errors import AdapterError
from adapters.limits import Limits
from adapters.prompts.shelf import TemplateShelf
from adapters.store import AdapterStore
from base.errors import UnservableBase
from service.access.audit import AuditLog
from service.access.gate import Gate
from service.access.keys import Keys
from service.access.quotas import Meter, Tenants
from service.admission import Admission
from service.api import (
    adapters,
    collections,
    compose,
    console,
    errors,
    feedback,
    files,
    fine_tuning,
    generate,
    keys,
    meta,
    openapi,
    page,
    templates,
    tenants,
    vllm_admin,
)
from service.api.connection import connection_class, room
from service.api.deps import Desk, Serving
from service.api.door import Bounds, Door
from service.api.openai import chat, completions, embeddings, models
from service.api.places import Places
from service.api.shedding import Shedder
from service.api.spool import Spool
from service.api.threads import Threads
from service.api.upload import FORM_BYTES, sweep
from service.config import Settings
from service.experiments import Experiments
from service.grammars import Grammars
from service.log import configure_logging
from service.metrics import Metrics
from service.net.listening import Listening
from service.retrieval.chunks import Chunker
from service.retrieval.embedding import open_embedder
from service.retrieval.errors import RetrievalError
from service.retrieval.library import Library
from service.retrieval.rerank import Reranker, open_reranker
from service.retrieval.room import Rooms
from service.tracing.open import open_tracing
from service.tracing.trace import Tracing, traced

if TYPE_CHECKING:
    from adapters.manifest import AdapterManifest
    from service.engine.config import EngineConfig

NO_FAST = "products in 8 bits need a CPU, the C library, and rows that are multiples of 64"
UPLOADS_AT_ONCE = 4
UPLOADS_WAITING = 32
UPLOADS_ARRIVING = 256  # each a file: half of what `connection.OWN_FILES` leaves them
SPOOLED = 8  # of the largest bodies, on the disk at once
SLOW_AT_ONCE = 8
QUICK_AT_ONCE = 16  # look-ups and long prompts; the default would be six threads on two cores
SEE_LOG = "The log above has the whole cause."
CANCEL_SECONDS = 2  # for replies that drain_seconds did not suffice for

logger = structlog.get_logger("nibble.app")


def create_app(
    settings: Settings,
    when_failed: Callable[[], None] = lambda: None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application; it starts to load the base when its lifespan starts.

    `when_failed` is called when the base could not be loaded: nothing will ever be served.
    `tracing` is used in place of what the settings and OpenTelemetry's variables say.
    """
    model, bounds = _model_name(settings.base), body_bounds(settings)
    app = FastAPI(
        title="Nibble",
        summary="One 4-bit base model, loaded once; every request names an adapter.",
        version=meta.own_version(),
        lifespan=_lifespan,
        docs_url=None,  # its page needs the network; ours does not
        openapi_url=None,  # `openapi.install` serves it from memory
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.when_failed = when_failed

    def several() -> bool:
        serving = app.state.desk.serving
        return serving is not None and serving.gate.several

    app.state.desk = Desk(
        settings=settings,
        admission=Admission(settings.max_queue),
        metrics=Metrics(model),
        places=Places(UPLOADS_AT_ONCE, UPLOADS_WAITING),
        spool=Spool(SPOOLED * bounds.largest, UPLOADS_ARRIVING),
        upload_directory=settings.home / "uploads",
        slow=Threads(SLOW_AT_ONCE, "nibble-slow", several),
        plans=Threads(1, "nibble-plans", several),
        tracing=tracing or open_tracing(settings.otlp_traces_endpoint, model, meta.own_version()),
    )
    app.add_middleware(Door, bounds=bounds, tracing=app.state.desk.tracing)
    openapi.install(app)
    errors.register(app)
    for router in routers(settings):
        app.include_router(router)
    return app


def routers(settings: Settings) -> list[APIRouter]:
    """Every route, of every skin."""
    own = (
        generate,
        adapters,
        compose,
        collections,
        templates,
        feedback,
        vllm_admin,
        keys,
        tenants,
        meta,
        page,
        console,
    )
    openai = (models, chat, completions, embeddings)
    training = (files.router, fine_tuning.router) if settings.fine_tuning else (fine_tuning.off,)
    return [*(module.router for module in (*own, *openai)), *training]


def body_bounds(settings: Settings) -> Bounds:
    """How large a body may be, by route."""
    return Bounds(
        settings.max_body_bytes,
        by_pattern=(("POST", collections.DOCUMENTS, settings.max_documents_bytes),),
        by_route={
            ("POST", "/adapters"): settings.max_upload_bytes + FORM_BYTES,
            ("POST", "/v1/files"): settings.max_file_bytes + FORM_BYTES,
        },
    )


def shedder(app: FastAPI) -> Shedder:
    """What a connection asks whether there is room."""
    desk: Desk = app.state.desk
    routes = (route for router in routers(desk.settings) for route in router.routes)
    return Shedder(desk.admission, routes, desk.metrics.refused)


def _model_name(base: str) -> str:
    """A label for dashboards: a directory is named by its last part."""
    return Path(base).name if Path(base).is_dir() else base


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    desk: Desk = app.state.desk
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(QUICK_AT_ONCE, thread_name_prefix="nibble-quick"))
    # A daemon: a stop in the middle of a long load does not wait for its end.
    threading.Thread(target=_load, args=(app, loop), name="nibble-load", daemon=True).start()
    yield
    desk.admission.drain()
    await desk.admission.empty(desk.settings.drain_seconds)
    if desk.serving is not None:
        await asyncio.to_thread(_close, desk.serving, desk.settings.drain_seconds)
    desk.slow.close()
    desk.plans.close()
    await asyncio.to_thread(desk.tracing.close)


def _load(app: FastAPI, loop: asyncio.AbstractEventLoop) -> None:
    """Loader thread: assemble the server, then let the event loop open the door."""
    desk: Desk = app.state.desk
    started = time.monotonic()
    try:
        loaded = assemble(desk.settings, desk.metrics, desk.tracing)
    except Exception as error:
        what, reason, next_step = why_not(error, desk.settings)
        logger.error(what, reason=reason, exc_info=next_step == SEE_LOG)
        _post(loop, lambda: _fail(app, f"{what}: {reason}", next_step))
        return
    _settle()
    logger.info("ready", base=loaded.spec.id, seconds=round(time.monotonic() - started, 2))
    if not _post(loop, lambda: _open(app, loaded)):
        _close(loaded)


def _settle() -> None:
    """What only the start needed goes back to the system. What it made the collector never walks
    again, which `nibble serve` has kept from running until now."""
    from base import heap

    heap.trim()
    heap.drop_library_pages()
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _post(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> bool:
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:  # the loop is closed: the server stopped while it was loading
        return False
    return True


def _open(app: FastAPI, loaded: Serving) -> None:
    desk: Desk = app.state.desk
    if desk.admission.state == "draining":
        _close(loaded)
        return
    desk.serving = loaded
    if desk.settings.fine_tuning:
        loaded.jobs.start()
    engine, gate = loaded.engine, loaded.gate
    engine.share_queue(lambda: gate.several)
    desk.admission.open(lambda: engine.waiting, engine.waiting_of, lambda: gate.several)
    threading.Thread(target=_warm, args=(app, loaded), name="nibble-warm", daemon=True).start()


def _warm(app: FastAPI, loaded: Serving) -> None:
    """What first requests, and the first question to a collection, would wait for."""
    make_routes(app)
    started = time.monotonic()
    try:
        loaded.library.recount()
        if loaded.library.warm():
            logger.info("retrieval is warm", seconds=round(time.monotonic() - started, 2))
    except (RetrievalError, AdapterError) as error:  # whoever asks will hear it
        logger.warning("retrieval is not ready", reason=str(error))


def make_routes(app: FastAPI) -> None:
    """FastAPI makes the routes of a router when it is first asked for one: a tenth of a second."""
    for route in app.router.routes:
        route.matches({"type": "http", "method": "GET", "path": "/", "headers": []})


def why_not(error: Exception, settings: Settings) -> tuple[str, str, str]:
    """What kept the server from starting: what, why, and what to do about it."""
    if isinstance(error, UnservableBase):
        next_step = "`nibble doctor` tells which bases fit here; --base takes another one."
        return "the base could not be loaded", str(error), next_step
    if isinstance(error, AdapterError | OSError):  # of the store, or of another file of the home
        shown = settings.shown()
        next_step = (
            "Adapters, their catalog and training files are under "
            f"{', '.join(f'--{name} {shown[name]}' for name in ('home', 'blobs', 'catalog'))}: "
            "these have to be there, writable, and with room left; a database has to be up."
        )
        return "the server could not start", str(error), next_step
    return "the server could not start", f"{type(error).__name__}: {error}", SEE_LOG


def _fail(app: FastAPI, reason: str, next_step: str) -> None:
    app.state.desk.failure, app.state.desk.next_step = reason, next_step
    app.state.desk.admission.fail()
    app.state.when_failed()


def _close(loaded: Serving, drain_seconds: float = 0.0) -> None:
    loaded.jobs.stop(drain_seconds)  # before the engine, which tries what they publish
    loaded.engine.stop()
    loaded.templates.close()
    loaded.experiments.close()
    loaded.audit.close()
    loaded.store.close()


def assemble(settings: Settings, metrics: Metrics, tracing: Tracing) -> Serving:
    """Base, store, engine, in this order; blocking. Raises UnservableBase, StoreUnavailable."""
    from adapters.lowering import lower
    from base.kernels import native_status
    from base.load import load_base
    from service.engine.loop import Engine
    from service.fetch import Fetch
    from service.jobs.opening import open_office
    from service.jobs.publication import Publication
    from service.prompt.assembly import Assembly
    from service.prompt.own_tokenizer import OwnTokenizers
    from service.prompt.templates import Templates

    if settings.hf_token is not None:
        os.environ.setdefault("HF_TOKEN", settings.hf_token.get_secret_value())
    base = load_base(
        settings.base_source,
        device=settings.device,
        dtype=settings.dtype,
        double_quant=settings.double_quant,
        precision=settings.precision,
        revision=settings.revision,
        keep=settings.keep_base,
        always_probe=settings.always_probe,
        lean=True,
    )
    if base.precision != settings.precision:
        logger.info("precision", asked=settings.precision, serving=base.precision, why=NO_FAST)
    if base.tokenizer is None:
        raise UnservableBase(f"{settings.base} has no tokenizer, so it cannot read a prompt")
    if (settings.max_model_len or 0) > base.spec.max_positions:
        what = {"asked": settings.max_model_len, "serving": base.spec.max_positions}
        logger.warning("max_model_len", **what, why="the base has no more positions")
    limits = Limits(max_weights_bytes=settings.max_upload_bytes, max_rank=settings.max_rank)
    store = open_store(settings)
    if base.spec.twin and (stored := store.catalog.made_for(base.spec.twin)):
        why = other_scales(base.spec.id, base.spec.double_quant, stored)
        logger.warning("stored adapters are refused", why=why)

    def probe(draft: AdapterManifest, weights: Path) -> None:
        engine.probe(lower(draft, weights, base))

    config = _engine_config(settings)
    engine = Engine(base, Fetch(store, base), config, traced(metrics, tracing))
    engine.start()
    own = OwnTokenizers(store, base.tokenizer, base.eos_token_ids)
    assembly = Assembly(base.tokenizer, engine.max_model_len, own)
    if settings.adapters is not None:
        tokens = assembly.tokens
        found = store.load_directory(settings.adapters, base.spec, limits, probe, tokens)
        logger.info("adapters", added=len(found.added), refused=sorted(found.refused))
    prompts = Templates(TemplateShelf(store.catalog))
    if settings.templates is not None:
        report = prompts.shelf.load_directory(settings.templates, prompts.renderer.check)
        logger.info("templates", added=len(report.added), refused=sorted(report.refused))
    dtype = str(base.dtype).removeprefix("torch.")
    metrics.describe(
        cache={
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(engine.stats().blocks_total),
            "cache_dtype": dtype if settings.kv_dtype == "auto" else settings.kv_dtype,
            "enable_prefix_caching": "True",
        },
        build={"version": meta.own_version(), "kernels": native_status(), "base": base.spec.id},
        max_lora=config.max_sequences,
        tally=engine.tally,
        capacity={"slot": config.slot_bytes, "host": config.host_cache_bytes},
    )
    audit = AuditLog(settings.home / "audit", settings.max_audit_bytes)
    publication = Publication(store, base.spec, limits, probe, audit)
    jobs = open_office(settings, publication)
    metrics.watch_jobs(jobs.queue.counts)
    metrics.watch_audit(lambda: (audit.unwritten, audit.cuts))
    return Serving(
        spec=base.spec,
        dtype=dtype,
        device=base.device.type,
        precision=base.precision,
        assembly=assembly,
        store=store,
        engine=engine,
        limits=limits,
        probe=probe,
        experiments=Experiments(store),
        jobs=jobs,
        grammars=Grammars(base.tokenizer, base.spec.vocab_size, base.eos_token_ids),
        library=_library(settings, base.tokenizer, store),
        reranker=_reranker(settings),
        templates=prompts,
        gate=_gate(settings, store),
        meter=Meter(Tenants(store.catalog), settings.quota_store),
        audit=audit,
    )


def _gate(settings: Settings, store: AdapterStore) -> Gate:
    key = settings.admin_key.get_secret_value() if settings.admin_key else None
    keys = Keys(store.catalog)
    if key is None and not keys.any():
        logger.info(
            "no API keys", who="everybody", reached_at=settings.host, first="nibble keys create"
        )
    return Gate(keys, key, local=settings.local)


def _library(settings: Settings, tokenizer: Any, store: AdapterStore) -> Library:
    """The collections under `settings`. Nothing of them is opened or imported yet."""
    from service.jobs.opening import own_id

    where = settings.collections
    if where.startswith("file:"):  # of this machine: another server may have one at the same path
        where = f"{own_id(settings.home)} {where}"
    key = settings.embedder_key.get_secret_value() if settings.embedder_key else None
    embedder = open_embedder(settings.embedder, settings.embedder_model, key)
    rooms = Rooms(store.catalog, where)
    return Library(settings.collections, embedder, Chunker(tokenizer), rooms)


def _reranker(settings: Settings) -> Reranker | None:
    if settings.reranker is None:
        return None
    key = settings.reranker_key.get_secret_value() if settings.reranker_key else None
    return open_reranker(settings.reranker, settings.reranker_model, key)


def _engine_config(settings: Settings) -> EngineConfig:
    """The engine's limits, as the settings have them."""
    from service.engine.config import EngineConfig

    return EngineConfig(
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_dtype=settings.kv_dtype,
        cuda_graphs=settings.cuda_graphs,
        max_model_len=settings.max_model_len,
        max_sequences=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_waiting=settings.max_queue,
        max_waiting_tokens=settings.max_queue_tokens,
        host_cache_bytes=settings.host_cache_bytes,
        slot_bytes=settings.slot_bytes,
        max_loads=settings.max_cold_loads,
    )


def open_store(settings: Settings) -> AdapterStore:
    """The store under `settings`, swept of what a crash left behind."""
    uploads = settings.home / "uploads"
    uploads.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = AdapterStore(
        settings.blobs,
        settings.catalog,
        cache=settings.home / "cache",
        max_cache_bytes=settings.blob_cache_bytes,
    )
    swept = store.sweep()
    logger.info(
        "store",
        uploads_swept=sweep(uploads),
        temporary_files_swept=len(swept.temporary_files),
        blobs_swept=len(swept.blobs),
    )
    for missing in swept.missing:
        logger.error("the weights of an adapter are missing", adapter=missing)
    return store


class Server(Listening):
    """uvicorn with our way to stop: first drain behind an open door, then close it."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.connection is not None:
            self._desk.metrics.watch_connections(self.connection.counts)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends the process at once."""
        if self._stop_at is not None:
            os._exit(128 + sig)
        self._desk.admission.drain()
        if self._desk.serving is not None:  # training ends its step while requests end
            self._desk.serving.jobs.ask_to_stop(self._desk.settings.drain_seconds)
        self._stop_at = time.monotonic() + self._desk.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._stop_at is None and not self._engine_failed():
            return False
        assert self._stop_at is not None
        return self._desk.admission.inside == 0 or time.monotonic() > self._stop_at

    def _engine_failed(self) -> bool:
        """Nothing more will be served: stop, so that whoever watches the process starts another."""
        serving = self._desk.serving
        if serving is None or serving.engine.alive:
            return False
        self._desk.failure, self._desk.next_step = "the engine failed", SEE_LOG
        self._desk.admission.drain()
        self._stop_at = time.monotonic() + CANCEL_SECONDS  # what failed gets its answer
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # What still runs has had its time: its end as cancelled travels the usual road, so that
        # every client hears why, before uvicorn cuts whatever is left.
        if self._desk.serving is not None:
            await asyncio.to_thread(self._desk.serving.jobs.stop, CANCEL_SECONDS)
            await asyncio.to_thread(self._desk.serving.engine.stop)
        await super().shutdown(sockets)

    def _log_started_message(self, listeners: object) -> None:
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                logger.info("listening", url=f"http://{where}", docs=f"http://{where}/docs")


class NotServing(SystemExit):
    """Why the process ends with status 1, and what to do about it."""

    def __init__(self, reason: str, next_step: str) -> None:
        super().__init__(reason)
        self.next_step = next_step


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; returns when what ran has finished.

    Raises NotServing when it could not start, or its engine failed.
    """
    configure_logging(settings.log_level, settings.log_format)

    def give_up() -> None:
        server.should_exit = True

    app = create_app(settings, when_failed=give_up)
    desk: Desk = app.state.desk
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connection_class(room(), body_bounds(settings), shedder(app)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
    server = Server(config, desk)
    server.run()
    if desk.failure is not None:
        raise NotServing(desk.failure, desk.next_step)
