"""Configurations for others' tools, one for each workload: `python -m deploy.load.configurations`.

They lie written in inference-perf/ and guidellm/, for the embedded base and 16 adapters named as
`deploy.load.adapters` names them; flags make others. inference-perf draws adapters by weight, so it
has no `distinct`; GuideLLM asks for one model in a run, so it has the base and one adapter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.load.adapters import names

HERE = Path(__file__).parent
# Parts of a power of two: their sum has to be 1.0 to the last bit.
UNITS = 1 << 16
SLO = {"ttft": 1.0, "tpot": 0.1}  # seconds
STEADY = ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0))  # requests/s, and for which part of `seconds`
BURSTS = ((1, 1 / 3), (16, 1 / 12)) * 4
Stages = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured, and for how long."""

    url: str = "http://127.0.0.1:8080"
    model: str = "mini"  # what the base is called
    tokenizer: str = "base/mini/weights"  # a directory: nobody is to ask a hub
    adapters: int = 16
    seconds: int = 60  # of each rate
    results: str = "build"  # where the tools write theirs


def split(count: int, exponent: float) -> list[dict[str, Any]]:
    """Each adapter's part of the traffic by Zipf's law; exponent 0 treats all alike."""
    weights = [1 / place**exponent for place in range(1, count + 1)]
    units = [max(1, int(UNITS * weight / sum(weights))) for weight in weights]
    units[0] += UNITS - sum(units)
    pairs = zip(names(count), units, strict=True)
    return [{"name": name, "split": unit / UNITS} for name, unit in pairs]


def inference_perf(
    target: Target, arrival: str, stages: Stages, parts: list[dict[str, Any]] | None
) -> dict[str, Any]:
    load: dict[str, Any] = {
        "type": arrival,
        "interval": 5,
        "stages": [
            {"rate": rate, "duration": max(1, round(part * target.seconds))}
            for rate, part in stages
        ],
        "num_workers": 1,
        "base_seed": 1,
    }
    if parts is not None:
        load["lora_traffic_split"] = parts
    lengths = {"std_dev": 0, "type": "fixed"}
    return {
        "server": {
            "type": "vllm",  # the names that it asks /metrics and the API for are ours too
            "model_name": target.model,
            "base_url": target.url,
            "ignore_eos": True,
        },
        "api": {"type": "completion", "streaming": True},
        "tokenizer": {"pretrained_model_name_or_path": target.tokenizer},
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
        "storage": {"local_storage": {"path": f"{target.results}/inference-perf/{{timestamp}}"}},
    }


def guidellm(target: Target, name: str, model: str, profile: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {"labels": {"name": name}},
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": target.url,
                "model": model,
                "request_format": "/v1/completions",
                "http2": False,
            },
            "tokenizer": {"kind": "huggingface_auto", "model": target.tokenizer},
            "data": [{"kind": "synthetic_text", "prompt_tokens": 64, "output_tokens": 32}],
            "profile": profile,
            "constraints": [{"kind": "max_duration", "seconds": target.seconds}],
            "seed": {"kind": "static", "value": 1},
            "metrics": {
                "kind": "generative",
                "sample_size": 0,
                "slo": {f"{name}_ms": 1000 * seconds for name, seconds in SLO.items()},
            },
            "outputs": [
                {"kind": kind, "path": f"{target.results}/guidellm/{name}.{kind}"}
                for kind in ("json", "html")
            ],
        },
    }


def configurations(target: Target) -> dict[str, dict[str, Any]]:
    """By the path of each file."""
    one = names(target.adapters)[0]
    drawn = {exponent: split(target.adapters, exponent) for exponent in (0.0, 1.0, 1.5)}
    loads: dict[str, tuple[str, Stages, list[dict[str, Any]] | None]] = {
        "base": ("poisson", STEADY, None),
        "identical": ("poisson", STEADY, [{"name": one, "split": 1.0}]),
        "uniform": ("poisson", STEADY, drawn[0.0]),
        "zipf-1.0": ("poisson", STEADY, drawn[1.0]),
        "zipf-1.5": ("poisson", STEADY, drawn[1.5]),
        "bursts-base": ("constant", BURSTS, None),
        "bursts-zipf-1.0": ("constant", BURSTS, drawn[1.0]),
    }
    made = {
        f"inference-perf/{name}.yaml": inference_perf(target, *load) for name, load in loads.items()
    }
    streams: dict[str, Any] = {"kind": "concurrent", "streams": [1, 4, 16]}
    poisson: dict[str, Any] = {"kind": "poisson", "rate": [1, 4]}
    for name, model in (("base", target.model), ("identical", one)):
        made[f"guidellm/{name}.yaml"] = guidellm(target, name, model, streams)
        slug = f"{name}-poisson"
        made[f"guidellm/{slug}.yaml"] = guidellm(target, slug, model, poisson)
    return made


def write(out: Path, target: Target) -> None:
    for path, content in configurations(target).items():
        text = yaml.safe_dump(content, sort_keys=False)
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, encoding="utf-8")


def main() -> None:
    plain = Target()
    parser = argparse.ArgumentParser(
        prog="python -m deploy.load.configurations", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE, help="where to write them")
    add("--url", default=plain.url, help="of the server")
    add("--model", default=plain.model, help="what the server calls its base")
    add("--tokenizer", default=plain.tokenizer, help="a directory with that base's tokenizer")
    add("--adapters", type=int, default=plain.adapters, help="how many, by Zipf's law")
    add("--seconds", type=int, default=plain.seconds, help="of each rate")
    add("--results", default=plain.results, help="where the tools write what they measured")
    given = vars(parser.parse_args())
    for name in ("adapters", "seconds"):
        if given[name] < 1:
            parser.error(f"--{name} is {given[name]}; should be at least 1")
    write(given.pop("out"), Target(**given))


if __name__ == "__main__":
    main()
