"""Configurations for others' tools, one for each workload: `python -m deploy.load.configurations`.

They lie written in inference-perf/ and guidellm/, for 16 adapters named as `deploy.load.adapters`
names them. inference-perf draws adapters by weight, so it has no `distinct`; GuideLLM asks for one
model in a run, so it has the base and one adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deploy.load.adapters import names

HERE = Path(__file__).parent
ADAPTERS = 16
# Parts of a power of two: their sum has to be 1.0 to the last bit.
UNITS = 1 << 16
SLO = {"ttft": 1.0, "tpot": 0.1}  # seconds
STEADY = [{"rate": rate, "duration": 60} for rate in (1, 2, 4, 8)]
BURSTS = [{"rate": rate, "duration": seconds} for rate, seconds in ((1, 20), (16, 5)) * 4]
URL, BASE, TOKENIZER = "http://127.0.0.1:8080", "mini", "base/mini"


def split(exponent: float) -> list[dict[str, Any]]:
    """Each adapter's part of the traffic by Zipf's law; exponent 0 treats all alike."""
    weights = [1 / place**exponent for place in range(1, ADAPTERS + 1)]
    units = [max(1, int(UNITS * weight / sum(weights))) for weight in weights]
    units[0] += UNITS - sum(units)
    pairs = zip(names(ADAPTERS), units, strict=True)
    return [{"name": name, "split": unit / UNITS} for name, unit in pairs]


def inference_perf(
    arrival: str, stages: list[dict[str, Any]], parts: list[dict[str, Any]] | None
) -> dict[str, Any]:
    load: dict[str, Any] = {
        "type": arrival,
        "interval": 5,
        "stages": stages,
        "num_workers": 1,
        "base_seed": 1,
    }
    if parts is not None:
        load["lora_traffic_split"] = parts
    lengths = {"std_dev": 0, "type": "fixed"}
    return {
        "server": {
            "type": "vllm",  # the names that it asks /metrics and the API for are ours too
            "model_name": BASE,
            "base_url": URL,
            "ignore_eos": True,
        },
        "api": {"type": "completion", "streaming": True},
        "tokenizer": {"pretrained_model_name_or_path": TOKENIZER},
        "data": {
            "type": "random",
            "input_distribution": {"min": 64, "max": 64, "mean": 64, **lengths},
            "output_distribution": {"min": 32, "max": 32, "mean": 32, **lengths},
        },
        "load": load,
        "report": {
            "request_lifecycle": {
                "per_adapter": True,
                "percentiles": [50, 90, 99],
                "use_server_output_tokens": True,
            },
            "goodput": {"constraints": SLO},
        },
        "storage": {"local_storage": {"path": "build/inference-perf/{timestamp}"}},
    }


def guidellm(name: str, model: str, profile: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {"labels": {"name": name}},
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": URL,
                "model": model,
                "request_format": "/v1/completions",
                "http2": False,
            },
            "tokenizer": {"kind": "huggingface_auto", "model": TOKENIZER},
            "data": [{"kind": "synthetic_text", "prompt_tokens": 64, "output_tokens": 32}],
            "profile": profile,
            "constraints": [{"kind": "max_duration", "seconds": 60}],
            "seed": {"kind": "static", "value": 1},
            "metrics": {
                "kind": "generative",
                "sample_size": 0,
                "slo": {f"{name}_ms": 1000 * seconds for name, seconds in SLO.items()},
            },
            "outputs": [
                {"kind": kind, "path": f"build/guidellm/{name}.{kind}"} for kind in ("json", "html")
            ],
        },
    }


def configurations() -> dict[str, dict[str, Any]]:
    """By the path of each file."""
    one = names(ADAPTERS)[0]
    loads: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]] = {
        "base": ("poisson", STEADY, None),
        "identical": ("poisson", STEADY, [{"name": one, "split": 1.0}]),
        "uniform": ("poisson", STEADY, split(0.0)),
        "zipf-1.0": ("poisson", STEADY, split(1.0)),
        "zipf-1.5": ("poisson", STEADY, split(1.5)),
        "bursts-base": ("constant", BURSTS, None),
        "bursts-zipf-1.0": ("constant", BURSTS, split(1.0)),
    }
    made = {f"inference-perf/{name}.yaml": inference_perf(*load) for name, load in loads.items()}
    streams: dict[str, Any] = {"kind": "concurrent", "streams": [1, 4, 16]}
    poisson: dict[str, Any] = {"kind": "poisson", "rate": [1, 4]}
    for name, model in (("base", BASE), ("identical", one)):
        made[f"guidellm/{name}.yaml"] = guidellm(name, model, streams)
        made[f"guidellm/{name}-poisson.yaml"] = guidellm(f"{name}-poisson", model, poisson)
    return made


if __name__ == "__main__":
    for path, content in configurations().items():
        text = yaml.safe_dump(content, sort_keys=False)
        (HERE / path).write_text(text, encoding="utf-8")
