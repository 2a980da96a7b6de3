"""What the server tells Prometheus.

Where vLLM has a metric, its name is used verbatim: its dashboards, autoscaling triggers and
LoRA-aware gateways then work unchanged. What only this server has begins with `nibble:`. No label
grows with the number of adapters or users.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.errors import AdapterError
from service.engine.observer import StepReport
from service.engine.request import AdapterKey, Finished
from service.jobs.job import Status
from service.net.library import Counts

# A process-wide switch of the library: without it every counter has a second series that only says
# when it was made.
disable_created_metrics()  # type: ignore[no-untyped-call]

LISTED_ADAPTERS = 64  # names in one label of lora_requests_info; the rest is `other`

# Buckets as in vLLM's dashboards, so that panels of both compare.
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# A wait or a prompt is mostly shorter than the first of these: theirs, and finer ones below.
_WAIT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, *_LATENCY)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LOAD = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Tally = Callable[[], Mapping[str, tuple[int, int]]]  # by tier: adapters, and their bytes
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]

# The engine's reasons in vLLM's words.
REASONS = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "cancelled": "abort",
    "error": "error",
}


class Metrics:
    """An Observer of the engine, with a registry of its own. Thread-safe."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._max_lora = "0"
        self._lora_lock = threading.Lock()
        self._lora_labels: tuple[str, str, str] | None = None
        self._of_the_engine()
        self._of_requests()
        self._of_adapters()

    def _of_the_engine(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests that run.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "KV-cache usage; 1 is full.")
        self._prompt = self._counter("vllm:prompt_tokens", "Prefill tokens processed.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._preempted = self._counter(
            "vllm:num_preemptions", "Sequences preempted, to be computed again."
        )
        self._queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._hits = self._counter("vllm:prefix_cache_hits", "Of these, tokens found.")
        self._drafts = self._counter(
            "vllm:spec_decode_num_drafts", "Drafts of speculative decoding."
        )
        self._draft_tokens = self._counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens of these drafts."
        )
        self._accepted = self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Of these, tokens that were right."
        )
        self._blocks = self._gauge("nibble:kv_cache_blocks", "Blocks of the KV cache.")
        self._blocks_used = self._gauge(
            "nibble:kv_cache_blocks_used", "Of these, blocks that running sequences hold."
        )
        self._steps = self._counters(
            "nibble:steps",
            "Steps on a GPU: replayed as a CUDA graph, or launched kernel by kernel.",
            "mode",
            ("replayed", "eager"),
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens of one step of the engine.", _TOKENS
        )

    def _of_requests(self) -> None:
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Time to first token.", _TTFT
        )
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens.", _PER_TOKEN
        )
        # The older name of the same; dashboards of both generations are in use.
        self._tpot = self._histogram(
            "vllm:time_per_output_token_seconds", "Time between two tokens.", _PER_TOKEN
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "Time from arrival to end.", _LATENCY
        )
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Time spent waiting.", _WAIT
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "Time spent in prefill.", _WAIT
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "Time spent in decoding.", _LATENCY
        )
        self._prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._output_length = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self._ended = self._counters(
            "vllm:request_success",
            "Requests that ended, by reason.",
            "finished_reason",
            sorted(set(REASONS.values())),
        )

        self._refused = self._counters(
            "nibble:requests_refused",
            "Requests for which the server (503) or a tenant's limit (429) had no room.",
            "reason",
            ("overloaded", "quota_exceeded", "loading", "draining", "unavailable"),
        )

    def _of_adapters(self) -> None:
        # vLLM gives this one no model_name, and gateways parse it as it is there.
        self._lora = Gauge(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is when this changed.",
            ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
            registry=self.registry,
        )
        self._loads = self._counter("nibble:adapter_loads", "Adapters brought to memory.")
        self._load_seconds = self._histogram(
            "nibble:adapter_load_seconds", "From asking for a cold adapter to having it.", _LOAD
        )
        self._load_queue_seconds = self._histogram(
            "nibble:adapter_load_queue_seconds", "Of this, the wait for a loader.", _LOAD
        )
        self._loaded_bytes = self._counter("nibble:adapter_loaded_bytes", "Bytes of these loads.")
        self._load_failures = self._counter("nibble:adapter_load_failures", "Loads that failed.")
        self._loads_refused = self._counter(
            "nibble:adapter_loads_refused", "Requests refused because too many loads waited."
        )
        self._sought = self._counters(
            "nibble:adapter_lookups",
            "Requests by the tier in which they found their adapter.",
            "tier",
            ("slot", "host", "store"),
        )
        self._adapter_hits = self._counter(
            "nibble:adapter_hits", "Requests whose adapter was in its slot already."
        )
        self._evicted = self._counters(
            "nibble:adapter_evictions",
            "Adapters that had to leave, by tier.",
            "tier",
            ("slot", "host"),
        )

    # The observer's side: called from the engine's thread.

    def stepped(self, report: StepReport) -> None:
        self._running.set(report.running)
        self._waiting.set(report.waiting)
        self._usage.set(report.blocks_used / report.blocks_total if report.blocks_total else 0.0)
        self._prompt.inc(report.prompt_tokens)
        self._generated.inc(report.generated_tokens)
        self._preempted.inc(report.preempted)
        self._queries.inc(report.prefix_queried)
        self._hits.inc(report.prefix_hit)
        self._drafts.inc(report.drafts)
        self._draft_tokens.inc(report.draft_tokens)
        self._accepted.inc(report.accepted_tokens)
        self._blocks.set(report.blocks_total)
        self._blocks_used.set(report.blocks_used)
        tokens = report.prompt_tokens + report.generated_tokens
        if tokens:
            self._step_tokens.observe(tokens)
        if report.replayed is not None:
            self._steps["replayed" if report.replayed else "eager"].inc()
        self._show_adapters(report.running_adapters, report.waiting_adapters)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._itl.observe(seconds)
        self._tpot.observe(seconds)

    def finished(self, end: Finished, seconds: float) -> None:
        self._ended[REASONS[end.reason]].inc()
        self._e2e.observe(seconds)
        self._queue_time.observe(end.queue_seconds)
        self._prefill_time.observe(end.prefill_seconds)
        self._decode_time.observe(end.decode_seconds)
        self._prompt_length.observe(end.prompt_tokens)
        self._output_length.observe(end.generated_tokens)

    def adapter_sought(self, name: str, tier: str) -> None:
        self._sought[tier].inc()
        if tier == "slot":
            self._adapter_hits.inc()

    def adapter_loaded(self, key: AdapterKey, seconds: float, nbytes: int, queued: float) -> None:
        self._loads.inc()
        self._load_seconds.observe(seconds)
        self._load_queue_seconds.observe(queued)
        self._loaded_bytes.inc(nbytes)

    def adapter_failed(self, name: str) -> None:
        self._load_failures.inc()

    def adapter_refused(self, name: str) -> None:
        self._loads_refused.inc()

    def adapter_evicted(self, digest: str, tier: str) -> None:
        # An unknown tier would be a new label: count it where it is looked for.
        self._evicted[tier if tier in self._evicted else "slot"].inc()

    # The server's side.

    def refused(self, reason: str) -> None:
        """`reason`: the error_type of the reply."""
        self._refused[reason].inc()

    def describe(
        self,
        cache: Mapping[str, str],
        build: Mapping[str, str],
        max_lora: int,
        tally: Tally,
        capacity: Mapping[str, int] | None = None,
    ) -> None:
        """Say once what does not change, and where to ask for what is resident. `capacity`: the
        bytes that adapters may take, by tier."""
        self._max_lora = str(max_lora)
        room = Gauge(
            "nibble:adapter_capacity_bytes",
            "Bytes that adapters may take.",
            ("model_name", "tier"),
            registry=self.registry,
        )
        for tier, size in (capacity or {}).items():
            room.labels(self._model, tier).set(size)
        for name, text, labels in (
            ("vllm:cache_config_info", "The KV cache.", cache),
            ("nibble:build_info", "What runs here.", build),
        ):
            Gauge(name, text, list(labels), registry=self.registry).labels(**labels).set(1)
        self.registry.register(_AtScrape(lambda: self._residents(tally())))
        self._show_adapters((), ())  # a gateway looks for it before anybody has asked

    def watch_jobs(self, counts: Callable[[], Mapping[Status, int]]) -> None:
        """Say at each scrape how many training jobs are in each state."""
        self.registry.register(_AtScrape(lambda: self._jobs(counts)))

    def watch_audit(self, state: Callable[[], tuple[int, int]]) -> None:
        """Say at each scrape how many lines of the audit log wait for the disk, and how often lines
        of it were gone."""
        self.registry.register(_AtScrape(lambda: self._audit(*state())))

    def watch_connections(self, counts: Counts) -> None:
        """Say at each scrape who is connected, and who was cut off before a first request came."""
        self.registry.register(_AtScrape(lambda: self._connections(counts)))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _residents(self, held: Mapping[str, tuple[int, int]]) -> Iterable[Metric]:
        found = {tier: held.get(tier, (0, 0)) for tier in ("slot", "host")}
        adapters = {tier: count for tier, (count, _) in found.items()}
        sizes = {tier: nbytes for tier, (_, nbytes) in found.items()}
        loading, _ = held.get("loading", (0, 0))
        gauge = GaugeMetricFamily
        yield self._by(gauge, "nibble:adapters_resident", "Adapters held.", "tier", adapters)
        yield self._by(gauge, "nibble:adapter_bytes", "Bytes they take.", "tier", sizes)
        yield self._one(gauge, "nibble:adapter_loads_pending", "Loads under way.", loading)

    def _jobs(self, counts: Callable[[], Mapping[Status, int]]) -> Iterable[Metric]:
        """Of the queue; without them while the catalog fails."""
        found: Mapping[Status, int] = {}
        with suppress(AdapterError):
            found = counts()
        what = "Training jobs by state."
        yield self._by(GaugeMetricFamily, "nibble:training_jobs", what, "status", found)

    def _audit(self, waiting: int, cuts: int) -> Iterable[Metric]:
        what = "Lines of the audit log that are not on the disk yet."
        yield self._one(GaugeMetricFamily, "nibble:audit_lines_waiting", what, waiting)
        what = "How often lines of the audit log were gone that this server had written."
        yield self._one(CounterMetricFamily, "nibble:audit_cuts", what, cuts)

    def _connections(self, found: Counts) -> Iterable[Metric]:
        what = "Connections: held until their first request is whole, and open to the event loop."
        here = {"held": found.held, "open": found.open}
        yield self._by(GaugeMetricFamily, "nibble:connections", what, "state", here)
        what = "Connections cut off before their first request was whole, by what did not come."
        cut = {"head": found.closed, "body": found.late}
        yield self._by(CounterMetricFamily, "nibble:connections_cut", what, "missing", cut)

    def _one(self, kind: Kind, name: str, text: str, value: float) -> Metric:
        found = kind(name, text, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found

    def _by(
        self, kind: Kind, name: str, text: str, label: str, values: Mapping[Any, float]
    ) -> Metric:
        """`values` by those of `label`."""
        found = kind(name, text, labels=("model_name", label))
        for which, value in values.items():
            found.add_metric((self._model, which), value)
        return found

    def _show_adapters(self, running: Iterable[str], waiting: Iterable[str]) -> None:
        labels = (self._max_lora, _listed(waiting), _listed(running))
        with self._lora_lock:
            old = self._lora_labels
            if labels == old:
                return
            # First the new set, then the old one away: a scrape between them sees the newest by
            # its value, and never nothing.
            self._lora.labels(*labels).set_to_current_time()
            self._lora_labels = labels
            if old is not None:
                self._lora.remove(*old)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _counters(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Counter]:
        """One for each value of the label; all of them are shown from the start."""
        family = Counter(name, text, ("model_name", label), registry=self.registry)
        return {value: family.labels(self._model, value) for value in values}

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(name, text, ("model_name",), registry=self.registry, buckets=buckets)
        return family.labels(self._model)


class _AtScrape(Collector):
    """Metrics that are asked for at each scrape, and not before."""

    def __init__(self, ask: Callable[[], Iterable[Metric]]) -> None:
        self._ask = ask

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self._ask()


def _listed(names: Iterable[str]) -> str:
    unique = sorted(set(names))
    if len(unique) > LISTED_ADAPTERS:
        unique = [*unique[:LISTED_ADAPTERS], "other"]
    return ",".join(unique)
