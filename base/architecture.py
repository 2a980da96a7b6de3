"""From config.json to an empty model: which architectures can be served, and why others cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

from base.errors import UnservableBase
from base.lean.model import LeanModel

# Keys of config.json by which a checkpoint could make transformers fetch or run foreign code
# (own classes, attention and expert kernels from the hub), or take the model for quantised.
_NEVER_PASSED_ON = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "quantization_config",
    }
)
_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


def empty_model(config_json: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' own model for this config, in eval mode, its parameters on the meta device.

    Buffers are real: most of them (rotary frequencies, embedding scales) are in no checkpoint, so
    what a meta device would leave in them could not be filled later.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _import_losses()
    config = read_config(config_json)
    _refuse_unservable(config, config_json)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # sizes that do not go together, each model in its own way
        raise UnservableBase(
            f"transformers cannot build a {config.model_type} of this config: {error}"
        ) from error
    _refuse_experts(model)
    return model.eval().requires_grad_(False)


def _import_losses() -> None:
    """transformers' losses, which every model imports, without SciPy: those for object detection
    want it, and it takes 36 MiB and a second.
    """
    from transformers import utils

    known = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        with suppress(ImportError):  # another version may have none; its models import as ever
            import_module("transformers.loss.loss_utils")
    finally:
        utils.is_scipy_available = known


def another(model: Any) -> Any:
    """A new model of transformers, of the class that a loaded one has or a lean one stands for.

    On the default device of this thread, its parameters not filled.
    """
    if not isinstance(model, LeanModel):
        return type(model)(copy.deepcopy(model.config))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(model.config_json)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def read_config(config_json: Mapping[str, Any]) -> Any:
    """transformers' configuration object, with nothing in it that names foreign code."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config_json.get("model_type")
    if not isinstance(model_type, str):
        raise UnservableBase("config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        reason = f"transformers {transformers.__version__} has no model_type {model_type!r}"
        if "auto_map" in config_json:
            reason += "; the checkpoint brings its own Python code, which is never run"
        raise UnservableBase(reason)
    try:
        return CONFIG_MAPPING[model_type].from_dict(_without_code(config_json))
    except Exception as error:  # transformers checks each field in its own way
        raise UnservableBase(f"config.json is not a valid {model_type} config: {error}") from error


def _without_code(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return [_without_code(v) for v in value] if isinstance(value, list) else value
    if value.keys() == {"__float__"}:  # how transformers writes infinities
        return float(value["__float__"])
    return {k: _without_code(v) for k, v in value.items() if k not in _NEVER_PASSED_ON}


def _refuse_unservable(config: Any, config_json: Mapping[str, Any]) -> None:
    """What the config alone tells; the rest shows when the model runs, in `base.probe`."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnservableBase(f"{kind} is an encoder-decoder; only decoders are served")
    _refuse_non_causal(config, config_json.get("architectures") or [])
    for count in _EXPERT_COUNTS:
        if (getattr(config, count, None) or 0) > 1:
            raise UnservableBase(
                f"{kind} is a mixture of experts ({count} = {getattr(config, count)}); "
                "only dense models are served"
            )
    foreign = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if foreign:
        raise UnservableBase(
            f"{kind} has layers of type {', '.join(sorted(foreign))}, whose state is not a "
            "paged KV cache; full_attention and sliding_attention are served"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnservableBase(f"{kind} shares keys and values between layers")
    for rope in _ropes(config):
        _refuse_varying_rope(config, rope)


def _refuse_non_causal(config: Any, architectures: list[str]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnservableBase(f"{kind} is no causal language model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = model_class.__name__
    if architectures and name not in architectures:
        raise UnservableBase(
            f"the checkpoint is a {architectures[0]}; for {kind}, {name} is served"
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")) or config.sub_configs:
        raise UnservableBase(f"{name} is no plain text decoder")
    if getattr(model_class, "_is_stateful", False):
        raise UnservableBase(f"{name} carries a recurrent state, which is not a paged KV cache")
    if not model_class._can_set_attn_implementation():
        raise UnservableBase(
            f"the attention of {name} does not go through transformers' attention interface"
        )


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Each set of rotary parameters: one, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        yield rope
    else:
        yield from (r for r in rope.values() if isinstance(r, Mapping))


def _refuse_varying_rope(config: Any, rope: Mapping[str, Any]) -> None:
    """One batch holds sequences of many lengths, so frequencies must not depend on the length."""
    kind = rope.get("rope_type")
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "dynamic" or (kind == "longrope" and config.max_position_embeddings > trained):
        raise UnservableBase(
            f"rope type {kind} changes its frequencies with the sequence length; "
            "default, linear, llama3 and yarn are served"
        )


def _refuse_experts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            raise UnservableBase(f"{path} is a mixture of experts; only dense models are served")
