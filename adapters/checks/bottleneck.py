"""Bottleneck adapters in the format of AdapterHub: BnConfig, and the names of its tensors.

The config is its adapter_config.json (`model_type`, `name`, `config`, ...), the weights are its
adapter.safetensors. Where the maths is, for Llama and its like: `BottleneckLayer` and `Adapter` of
the library `adapters` (Poth et al. 2023, arXiv 2311.11077).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.activation import activation
from adapters.checks.amounts import factor
from adapters.config_rules import Rule, flag, ignore, layer_numbers, present, refuse
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import Expected, consume
from adapters.safetensors_header import Header
from base.spec import BaseSpec

NATIVE = ("llama", "mistral")  # AdapterHub runs the residual connection itself
HOOKED = ("qwen2", "qwen3")  # the model runs it, after AdapterHub's hook
LOCATIONS = {  # AdapterHub's module -> after which layer of a block it stands
    "attention_adapters": "self_attn.o_proj",
    "output_adapters": "mlp.down_proj",
}
MAX_WIDTH = 1 << 16  # of a bottleneck
LEARNED = {"learned": 1, "channel": 0}  # scales in the file: numbers, 0 for one each channel
RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # what adapter-transformers 1 called them

_SEQUENCE = "its gate is the mean over a whole sequence, which is not known token by token"


def _reduction(name: str, value: Any) -> None:
    if value is None:
        return  # refused as missing
    table = value if isinstance(value, dict) else {"default": value}
    if not table or not all(re.fullmatch(r"\d{1,4}|default", key) for key in table):
        raise InvalidAdapter("expected a number, or numbers by layer and 'default'", name)
    for key, number in table.items():
        factor(f"{name}[{key!r}]", number)
        if number <= 0:
            raise InvalidAdapter(f"{number}, expected a number above 0", f"{name}[{key!r}]")


def _activation(name: str, value: Any) -> None:
    activation(name, _plain(value) if isinstance(value, str) else value)


def _plain(name: str) -> str:
    """AdapterHub asks transformers for it, but for one that it names itself."""
    name = name.lower()
    return "leaky_relu" if name == "leakyrelu" else name


def _scaling(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in LEARNED:
        factor(name, value)


def _residual(name: str, value: Any) -> None:
    if value == "post_add":
        raise InvalidAdapter("'post_add' wants a norm after the layer, which no Llama has", name)
    flag(name, value)


RULES: Mapping[str, Rule] = {
    "architecture": refuse("only bottlenecks are served from AdapterHub's format"),
    "mh_adapter": flag,
    "output_adapter": flag,
    "cross_adapter": ignore,  # there is no cross-attention, so AdapterHub adds nothing either
    "reduction_factor": _reduction,
    "non_linearity": _activation,
    "original_ln_before": flag,
    "original_ln_after": flag,
    "ln_before": refuse("a norm of its own before the bottleneck is not served"),
    "ln_after": refuse("a norm of its own after the bottleneck is not served"),
    "is_parallel": flag,
    "scaling": _scaling,
    "use_gating": refuse(_SEQUENCE),
    "residual_before_ln": _residual,
    "adapter_residual_before_ln": ignore,  # says something with ln_after alone
    "inv_adapter": refuse("invertible adapters on the embeddings are not served"),
    "inv_adapter_reduction_factor": ignore,
    "leave_out": layer_numbers,
    "phm_layer": refuse("layers of hypercomplex products (Compacter) are not served"),
    **dict.fromkeys(
        (
            "phm_dim",
            "factorized_phm_W",
            "shared_W_phm",
            "shared_phm_rule",
            "factorized_phm_rule",
            "phm_c_init",
            "phm_init_range",
            "learn_phm",
            "hypercomplex_nonlinearity",
            "phm_rank",
            "phm_bias",
        ),
        ignore,  # of such layers
    ),
    "init_weights": ignore,  # the file holds them
    "init_weights_seed": ignore,
    "dropout": ignore,  # off at inference
    "stochastic_depth": ignore,
}
# Beside `config`: who saved it from what, and none of it is in the maths.
ABOUT = ("model_name", "model_class", "type", "version", "hidden_size", "peft_type", "nibble")


def is_adapter_hub(config: Mapping[str, Any]) -> bool:
    """Is this AdapterHub's adapter_config.json, which names no method of PEFT?"""
    return config.get("peft_type") is None and isinstance(config.get("config"), dict)


def check_bottleneck(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # the file holds every number that is served
    own = _own_config(config)
    _check_model(config, own, spec)
    name = present(config, "name")
    if not isinstance(name, str) or not re.fullmatch(r"[^.\s]{1,128}", name):
        raise InvalidAdapter(f"{str(name)[:80]!r}, expected a name without dots or spaces", "name")
    root = "model." if any(n.startswith("model.") for n in header.tensors) else ""
    promised: dict[str, Expected] = {}
    starts: dict[str, str] = {}
    widths: dict[str, int] = {}
    for path, start, width in _places(own, spec, f"{root}layers.{{}}.{{}}.adapters.{name}."):
        starts[path], widths[path] = start, width
        promised |= _tensors(path, start, width, own["scaling"], spec.hidden_size)
    if not starts:
        raise InvalidAdapter("puts an adapter nowhere", "config.mh_adapter")
    strange = next((n for n in header.tensors if n not in promised), None)
    if strange:
        raise InvalidAdapter(
            f"left over: the config promises {len(promised)} tensors, such as "
            f"{next(iter(promised))}",
            strange,
        )
    found = consume(header.tensors, promised, spec, ())
    learned = 0 if own["scaling"] not in LEARNED else len(starts) * _scales(own["scaling"], spec)
    return Checked(
        Validated(
            kind="bottleneck",
            rank=max(widths.values()),
            targets=tuple(sorted(starts)),
            config={
                "peft_type": "BOTTLENECK",
                "tensors": starts,
                "widths": widths,
                "modules_to_save": None,
                **{key: own[key] for key in _KEPT},
            },
            parameters=numbers(found),
            memory_bytes=4 * (numbers(found) - learned),
        )
    )


_KEPT = (
    "non_linearity",
    "scaling",
    "is_parallel",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
)


def _own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The BnConfig with its defaults, every field checked. Raises InvalidAdapter."""
    inner = present(config, "config")
    if not isinstance(inner, dict):
        raise InvalidAdapter(f"{str(inner)[:80]!r}, expected AdapterHub's BnConfig", "config")
    for key, value in config.items():
        if key not in ("config", "model_type", "name", *ABOUT) and value is not None:
            raise InvalidAdapter("unknown field: it may change what the adapter computes", key)
    for key, value in inner.items():
        if key in RULES:
            RULES[key](f"config.{key}", value)
        elif value is not None:
            reason = "unknown field: it may change what the adapter computes"
            raise InvalidAdapter(reason, f"config.{key}")
    for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        if inner.get(key) is None:
            raise InvalidAdapter("is missing", f"config.{key}")
    defaults = {
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": False,
        "scaling": 1.0,
    }
    own = defaults | {key: value for key, value in inner.items() if value is not None}
    name = str(own["non_linearity"])
    own["non_linearity"] = _plain(name if "version" in config else RENAMED.get(name, name))
    return own


def _check_model(config: Mapping[str, Any], own: Mapping[str, Any], spec: BaseSpec) -> None:
    model = present(config, "model_type")
    if spec.architecture not in (*NATIVE, *HOOKED):
        raise InvalidAdapter(
            f"bottlenecks are served for {', '.join((*NATIVE, *HOOKED))}, and this base is a "
            f"{spec.architecture}",
            "model_type",
        )
    if model != spec.architecture:
        raise InvalidAdapter(
            f"{str(model)[:80]!r}, and this base is a {spec.architecture!r}", "model_type"
        )
    if model in HOOKED and not own["original_ln_after"]:
        raise InvalidAdapter(
            f"false: AdapterHub runs none such on {model}", "config.original_ln_after"
        )


def _places(own: Mapping[str, Any], spec: BaseSpec, pattern: str) -> list[tuple[str, str, int]]:
    """Each layer that a bottleneck follows, what its tensors begin with, and its width."""
    left_out = own.get("leave_out") or ()
    left_out = [left_out] if isinstance(left_out, int) else left_out
    places = []
    for layer in range(spec.num_layers):
        for location, leaf in LOCATIONS.items():
            wanted = "mh_adapter" if location == "attention_adapters" else "output_adapter"
            if layer in left_out or not own[wanted]:
                continue
            width = _width(own["reduction_factor"], layer, spec.hidden_size)
            places.append((f"model.layers.{layer}.{leaf}", pattern.format(layer, location), width))
    return places


def _width(reduction: Any, layer: int, hidden: int) -> int:
    where = "config.reduction_factor"
    if isinstance(reduction, dict):
        reduction = reduction.get(str(layer), reduction.get("default"))
        if reduction is None:
            raise InvalidAdapter(f"says nothing of layer {layer}, and has no default", where)
    if hidden / reduction > MAX_WIDTH:
        raise InvalidAdapter(f"{reduction:g} makes more than {MAX_WIDTH} of {hidden}", where)
    return max(1, int(hidden // reduction))


def _scales(scaling: str, spec: BaseSpec) -> int:
    return LEARNED[scaling] or spec.hidden_size


def _tensors(path: str, start: str, width: int, scaling: Any, hidden: int) -> dict[str, Expected]:
    why = f" for a bottleneck of {width}"
    promised = {
        "adapter_down.0.weight": Expected(path, (width, hidden), "factor", why),
        "adapter_down.0.bias": Expected(path, (width,), "vector", why),
        "adapter_up.weight": Expected(path, (hidden, width), "factor", why),
        "adapter_up.bias": Expected(path, (hidden,), "vector", why),
    }
    if scaling in LEARNED:
        shape = (LEARNED[scaling] or hidden,)
        promised["scaling"] = Expected(path, shape, "scale", f" for scaling {scaling!r}")
    return {start + leaf: expected for leaf, expected in promised.items()}
