"""The same weights for llama.cpp: a base as Q4_0, LoRAs as they are. Needs `gguf`, an extra.

Written from the NF4 values, in float16, and made Q4_0 by llama.cpp itself, as its users do. Token
ids go in and come out; the vocabulary in the file is one word for each id, since the server of
llama.cpp wants one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from base.load import Base, load_base
from base.nf4 import NF4Linear

ARCHITECTURES = ("qwen2", "qwen3")  # whose tensors llama.cpp wants as transformers has them
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_UNREAD = "attn_output.bias"  # of a layer: llama.cpp knows no bias there


def gguf_name(path: str) -> str:
    """llama.cpp's name of a module: `model.layers.3.mlp.up_proj` is `blk.3.ffn_up`."""
    if path in _TOP:
        return _TOP[path]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if found is None or found[2] not in _IN_LAYER:
        raise ValueError(f"{path}: no module of {' or '.join(ARCHITECTURES)}")
    return f"blk.{found[1]}.{_IN_LAYER[found[2]]}"


def write_base(model: Path, out: Path, threads: int) -> Path:
    """The base at `model` as Q4_0 in `out`, unless it is there already."""
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    half, unfinished = out.with_suffix(".f16"), out.with_suffix(".part")
    try:
        _write_half(load_base(model, device="cpu", dtype="float32"), half)
        _quantise(half, unfinished, threads)
        unfinished.replace(out)
    finally:
        half.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
    return out


def write_lora(adapter: Path, architecture: str, out: Path) -> Path:
    """PEFT's LoRA in the directory `adapter` as GGUF, in float16."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    writer = _gguf().GGUFWriter(str(out), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if found is None:
            raise ValueError(f"{adapter}: {name} is no tensor of a plain LoRA")
        _add(writer, f"{gguf_name(found[1])}.weight.lora_{found[2].lower()}", tensor)
    _finish(writer)
    return out


def _write_half(base: Base, out: Path) -> None:
    spec, config = base.spec, base.model.config
    if spec.architecture not in ARCHITECTURES:
        raise ValueError(f"{spec.architecture}: only {' and '.join(ARCHITECTURES)} are written")
    writer = _gguf().GGUFWriter(str(out), spec.architecture)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    _add_vocabulary(writer, spec.vocab_size, base.eos_token_ids)
    for name, tensor in _tensors(base):
        if name.endswith(_UNREAD):
            raise ValueError(f"{name}: llama.cpp has no place for it in {spec.architecture}")
        _add(writer, name, tensor)
    _finish(writer)


def _add_vocabulary(writer: Any, size: int, eos: Collection[int]) -> None:
    """The words t0, t1, …; no BOS is put before a prompt."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_vocab_size(size)
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([1] * size)  # normal
    writer.add_token_merges(["t 0"])
    writer.add_add_bos_token(False)
    last = min(eos, default=0)
    writer.add_bos_token_id(last)
    writer.add_eos_token_id(last)


def _tensors(base: Base) -> Iterator[tuple[str, Tensor]]:
    for path, module in base.model.named_modules():
        if path == "lm_head" and base.spec.tied_embeddings:
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, NF4Linear):
            own["weight"] = module.weight.dequantize(torch.float32)
            if module.bias is not None:
                own["bias"] = module.bias
        for kind, tensor in own.items():
            yield f"{gguf_name(path)}.{kind}", tensor.detach()


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    dtype = torch.float16 if tensor.dim() > 1 else torch.float32  # vectors as llama.cpp wants them
    writer.add_tensor(name, tensor.to(dtype).contiguous().numpy())


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantise(half: Path, out: Path, threads: int) -> None:
    llama: Any = importlib.import_module("llama_cpp")
    wanted = llama.llama_model_quantize_default_params()
    wanted.nthread = threads
    wanted.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    code = llama.llama_model_quantize(str(half).encode(), str(out).encode(), ctypes.byref(wanted))
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {half}: {code}")


def _gguf() -> Any:
    return importlib.import_module("gguf")
