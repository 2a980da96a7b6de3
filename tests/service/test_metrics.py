"""Metrics: vLLM's names, right sums, and labels that do not grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.observer import Observer, StepReport
from service.engine.request import AdapterKey, Finished
from service.metrics import LISTED_ADAPTERS, Metrics
from service.net.library import Counts

STEP = StepReport(2, 3, 5, 20, 7, 2, 1, 16, 8, 0.01, 1, 6, 4)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset({"model_name": "m", **labels}.items())]


# As dashboards, autoscalers and gateways written for vLLM look for them.
@pytest.mark.parametrize(
    "name",
    [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "nibble:kv_cache_blocks",
        "nibble:kv_cache_blocks_used",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
        "vllm:iteration_tokens_total_bucket",
        "vllm:request_success_total",
    ],
)
def test_names_are_there_from_the_start(name: str) -> None:
    found = [labels for one, labels in samples(Metrics("m")) if one == name]
    assert found
    assert all(("model_name", "m") in labels for labels in found)


def test_steps_add_up() -> None:
    metrics = Metrics("m")
    observer: Observer = metrics
    observer.stepped(STEP)
    observer.stepped(replace(STEP, running=0, waiting=0, blocks_used=0))
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 14
    assert value(metrics, "vllm:generation_tokens_total") == 4
    assert value(metrics, "vllm:num_preemptions_total") == 2
    assert value(metrics, "vllm:prefix_cache_queries_total") == 32
    assert value(metrics, "vllm:prefix_cache_hits_total") == 16
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 2
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 12
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 8
    assert value(metrics, "nibble:kv_cache_blocks_used") == 0
    assert value(metrics, "nibble:kv_cache_blocks") == 20
    observer.stepped(STEP)
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25


@pytest.mark.parametrize(
    ("reason", "theirs"),
    [
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
        ("length", "length"),
        ("cancelled", "abort"),
        ("error", "error"),
    ],
)
def test_ends_by_vllm_s_reasons(reason: str, theirs: str) -> None:
    metrics = Metrics("m")
    end = Finished(0, reason, "t", 3, 0, 5, queue_seconds=0.5, decode_seconds=2)  # type: ignore[arg-type]
    metrics.finished(end, 3.0)
    for one in ("stop", "length", "abort", "error"):
        counted = value(metrics, "vllm:request_success_total", finished_reason=one)
        assert counted == (one == theirs)
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 3.0
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 0.5
    waited = "vllm:request_queue_time_seconds_bucket"
    assert value(metrics, waited, le="0.3") == 0 < value(metrics, waited, le="0.5") == 1
    assert value(metrics, "vllm:request_generation_tokens_sum") == 5


def test_a_short_wait_has_buckets_of_its_own() -> None:
    metrics = Metrics("m")
    for seconds in (0.0004, 0.004):
        metrics.finished(Finished(0, "length", "t", 3, 0, 5, queue_seconds=seconds), 0.1)
    bounds = {"0.001": 1, "0.0025": 1, "0.005": 2, "0.3": 2}
    waited = "vllm:request_queue_time_seconds_bucket"
    assert {le: value(metrics, waited, le=le) for le in bounds} == bounds


def test_capacity_stands_beside_use() -> None:
    metrics = Metrics("m")
    metrics.describe({"a": "1"}, {"b": "2"}, 8, dict, {"slot": 100, "host": 300})
    assert value(metrics, "nibble:adapter_capacity_bytes", tier="slot") == 100
    assert value(metrics, "nibble:adapter_capacity_bytes", tier="host") == 300
    assert value(metrics, "nibble:adapter_bytes", tier="slot") == 0


def lora(metrics: Metrics) -> list[dict[str, str]]:
    return [dict(labels) for name, labels in samples(metrics) if name == "vllm:lora_requests_info"]


def test_adapter_sets_replace_each_other() -> None:
    metrics = Metrics("m")
    metrics.describe({"a": "1"}, {"b": "2"}, max_lora=8, tally=dict)
    for running in (("a",), ("b", "a"), ("b", "a"), ()):
        metrics.stepped(replace(STEP, running_adapters=running, waiting_adapters=("w",)))
        assert lora(metrics) == [
            {
                "max_lora": "8",
                "running_lora_adapters": ",".join(sorted(running)),
                "waiting_lora_adapters": "w",
            }
        ]


def test_a_gateway_finds_its_metrics_before_any_request() -> None:
    metrics = Metrics("m")
    metrics.describe(
        {"block_size": "16", "num_gpu_blocks": "9"}, {"b": "2"}, max_lora=8, tally=dict
    )
    (labels,) = lora(metrics)
    assert labels == {"max_lora": "8", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    # The names of the Gateway API inference extension's model-server protocol, and its types.
    text = metrics.exposition().decode()
    for name in (
        *("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
        *("vllm:lora_requests_info", "vllm:cache_config_info"),
    ):
        assert f"# TYPE {name} gauge" in text
    assert {"block_size", "num_gpu_blocks"} <= {
        label for name, labels in samples(metrics) for label, _ in labels if "cache_config" in name
    }


def test_a_hundred_thousand_adapters_fit_into_a_scrape() -> None:
    metrics = Metrics("m")
    held = {"slot": (100, 1 << 30), "host": (99_900, 1 << 40)}
    metrics.describe({"a": "1"}, {"b": "2"}, max_lora=8, tally=lambda: held)
    names = tuple(f"{n:064}" for n in range(100_000))
    metrics.stepped(replace(STEP, running_adapters=names, waiting_adapters=names))
    for name in names[::100]:
        metrics.adapter_sought(name, "host")
        metrics.adapter_loaded(AdapterKey(name, "unmerged", ""), 0.1, 1, 0.1)
    assert len(metrics.exposition()) <= 256 * 1024
    assert len(lora(metrics)) == 1


def test_many_adapters_are_cut_to_some_and_other() -> None:
    metrics = Metrics("m")
    many = tuple(f"a{number:04}" for number in range(1000))
    metrics.stepped(replace(STEP, running_adapters=many))
    (labels,) = lora(metrics)
    names = labels["running_lora_adapters"].split(",")
    assert len(names) == LISTED_ADAPTERS + 1
    assert names[-1] == "other"


def test_no_series_grows_with_adapters() -> None:
    metrics = Metrics("m")
    metrics.describe({"a": "1"}, {"b": "2"}, max_lora=8, tally=dict)
    before = len(samples(metrics))
    for number in range(200):
        metrics.adapter_loaded(AdapterKey(f"{number:064x}", "unmerged", ""), 0.1, 1000, 0.02)
        metrics.adapter_sought(f"a{number}", ("slot", "host")[number % 2])
        metrics.adapter_failed(f"a{number}")
        metrics.adapter_refused(f"a{number}")
        metrics.adapter_evicted(f"{number:064x}", "slot")
        metrics.stepped(replace(STEP, running_adapters=(f"a{number}",)))
    assert len(samples(metrics)) - before <= 1
    assert value(metrics, "nibble:adapter_loads_total") == 200
    assert value(metrics, "nibble:adapter_hits_total") == 100
    for tier, count in (("slot", 100), ("host", 100), ("store", 0)):
        assert value(metrics, "nibble:adapter_lookups_total", tier=tier) == count
    assert value(metrics, "nibble:adapter_load_queue_seconds_count") == 200
    assert value(metrics, "nibble:adapter_load_failures_total") == 200
    assert value(metrics, "nibble:adapter_loads_refused_total") == 200
    assert value(metrics, "nibble:adapter_loaded_bytes_total") == 200_000
    assert value(metrics, "nibble:adapter_evictions_total", tier="slot") == 200
    assert value(metrics, "nibble:adapter_evictions_total", tier="host") == 0


def test_connections_are_counted_at_every_scrape() -> None:
    metrics, counts = Metrics("m"), Counts()
    metrics.watch_connections(counts)
    counts.held, counts.open, counts.late, counts.closed = 3, 2, 5, 7
    assert value(metrics, "nibble:connections", state="held") == 3
    assert value(metrics, "nibble:connections", state="open") == 2
    assert value(metrics, "nibble:connections_cut_total", missing="body") == 5
    assert value(metrics, "nibble:connections_cut_total", missing="head") == 7


def test_the_engine_is_asked_at_every_scrape() -> None:
    held = {"slot": (2, 15), "host": (0, 0), "loading": (0, 0)}
    metrics = Metrics("m")
    metrics.describe({"block_size": "16"}, {"version": "1"}, max_lora=1, tally=lambda: held)
    assert value(metrics, "nibble:adapters_resident", tier="slot") == 2
    assert value(metrics, "nibble:adapter_bytes", tier="slot") == 15
    held |= {"host": (1, 7), "loading": (1, 0)}
    assert value(metrics, "nibble:adapters_resident", tier="host") == 1
    assert value(metrics, "nibble:adapter_bytes", tier="host") == 7
    assert value(metrics, "nibble:adapter_loads_pending") == 1
    assert samples(metrics)["vllm:cache_config_info", frozenset({("block_size", "16")})] == 1
    assert samples(metrics)["nibble:build_info", frozenset({("version", "1")})] == 1


def test_two_servers_in_one_process_do_not_share() -> None:
    one, other = Metrics("m"), Metrics("m")
    one.stepped(STEP)
    assert value(other, "vllm:generation_tokens_total") == 0
