"""A base of a given shape with random NF4 weights: what is measured is speed, not sense.

It is written in bitsandbytes' own 4-bit format, so nobody has to quantise half a billion weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from base.prequantized import nf4_levels

QWEN2_04B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN2_7B: dict[str, Any] = {  # its table tied, as the other's is
    **QWEN2_04B,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}
SHAPES = {"qwen2-0.4b": QWEN2_04B, "qwen2-7b": QWEN2_7B}
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
DONE = "complete"
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}
BLOCK = 64  # weights
LARGEST = 0.04  # of a block, about: with levels drawn evenly the weights deviate by half of it


def random_model(name: str, cache: Path) -> Path:
    """The directory of the model `name` of SHAPES, written once, a file for each layer."""
    directory = cache / name
    if not (directory / DONE).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_model(directory, SHAPES[name])
        (directory / DONE).touch()
    return directory


def write_model(directory: Path, shape: dict[str, Any]) -> None:
    """A checkpoint as transformers reads it; at most one file of it is in memory at a time."""
    from transformers import AutoConfig

    fields = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], dtype="bfloat16", **fields)
    config.quantization_config = QUANTIZATION
    config.save_pretrained(directory)
    chance = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for number, tensors in enumerate(_files(shape, chance)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer(shape["vocab_size"]).save_pretrained(directory)


def _files(shape: dict[str, Any], chance: torch.Generator) -> Iterator[dict[str, Tensor]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=chance)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    yield {
        "model.embed_tokens.weight": normal(shape["vocab_size"], hidden),
        "model.norm.weight": ones.clone(),
    }
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(shape["num_hidden_layers"]):
        tensors = {
            "input_layernorm.weight": ones.clone(),
            "post_attention_layernorm.weight": ones.clone(),
        }
        for path, (out, width) in linears.items():
            tensors |= _nf4(f"{path}.weight", out, width, chance)
            if path in BIASED:
                tensors[f"{path}.bias"] = normal(out)
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _nf4(name: str, out: int, width: int, chance: torch.Generator) -> dict[str, Tensor]:
    """One weight [out, width] as bitsandbytes saves it, its codes drawn evenly."""
    blocks = out * width // BLOCK
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [out, width]}
    codes = torch.randint(256, (out * width // 2, 1), generator=chance, dtype=torch.uint8)
    return {
        name: codes,
        f"{name}.absmax": LARGEST * (0.75 + 0.5 * torch.rand(blocks, generator=chance)),
        f"{name}.quant_map": nf4_levels(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def _tokenizer(size: int) -> Any:
    """Byte-level, every id a token, so that detokenizing costs what it costs in earnest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<s>", "</s>"]  # the first is what transformers would add
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{number}" for number in range(size - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        clean_up_tokenization_spaces=False,
    )
