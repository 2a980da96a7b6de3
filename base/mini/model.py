"""The shape of mini, and its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from base.mini.tokenizer import END, END_OF_TEXT, PAD, POSITIONS


def config(tokenizer: Tokenizer) -> Qwen3Config:
    """Qwen3's shape with biases; every linear's sizes are multiples of 64, so NF4 blocks fit."""
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def fresh(tokenizer: Tokenizer, seed: int) -> Qwen3ForCausalLM:
    """An untrained model in fp32; its biases start at zero and train."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config(tokenizer))


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """config.json, generation_config.json and the weights in bfloat16 (half the size)."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    temporary = directory / f".model.{os.getpid()}"
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
    shape = {**model.config.to_diff_dict(), "architectures": ["Qwen3ForCausalLM"]}
    shape["dtype"] = "bfloat16"
    replace_file(directory / "config.json", json.dumps(shape, indent=2, sort_keys=True) + "\n")
    ends = [tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)]
    generation = {"eos_token_id": ends, "pad_token_id": tokenizer.token_to_id(PAD)}
    text = json.dumps({**generation, "do_sample": False}, indent=2) + "\n"
    replace_file(directory / "generation_config.json", text)
