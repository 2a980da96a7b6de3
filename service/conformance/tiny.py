"""Tiny random bases of several architectures, with a byte-level tokenizer. Everything is seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
TIED = {"llama": False, "qwen2": True, "qwen3": False, "mistral": False, "gemma": True}
VOCABULARY = 512


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """n ids of the makers' vocabulary, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(6, VOCABULARY, (n,), generator=generator).tolist()
    return ids


def make_base(
    directory: str | Path,
    architecture: str,
    *,
    seed: int = 0,
    tied: bool | None = None,
    **config: Any,
) -> Path:
    """Save a tiny random base with a byte-level tokenizer: hidden 64, heads of 32, 2 layers.

    Biases and norms are random too, so that leaving one out is seen. `tied` overrides whether
    lm_head shares the embedding table (TIED has the defaults); `config` overrides any field of
    the transformers configuration. Returns the directory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    tied = TIED[architecture] if tied is None else tied
    own: dict[str, dict[str, Any]] = {
        "qwen3": {"attention_bias": True, "head_dim": 32},
        "mistral": {"head_dim": 32, "sliding_window": None},
        "gemma": {"head_dim": 32},
    }
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings = AutoConfig.for_model(
        architecture, **{**fields, **own.get(architecture, {}), **config}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        # transformers leaves the padding token's row at zero, where DoRA's norm divides by zero.
        table = model.get_input_embeddings().weight.data
        table[0] = 0.08 * torch.randn_like(table[0])
        # With tied embeddings a random model repeats its last token for ever, which hides errors.
        # A last norm of random signs breaks that. Gemma's norms multiply by 1 + weight.
        model.model.norm.weight.data += torch.randn_like(model.model.norm.weight) - 1
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Any:
    """512 tokens: four specials, 256 bytes, and letter pairs as merges. Covers any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vowels, consonants = "aeiou", "bcdfghjklmnpqrstvwxyz"
    pairs = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pairs += [(c, v) for c in consonants for v in vowels]
    pairs += [(v, c) for c in consonants for v in vowels]
    pairs = pairs[: VOCABULARY - len(specials) - len(alphabet)]
    vocabulary = {
        token: i
        for i, token in enumerate(specials + alphabet + [left + right for left, right in pairs])
    }
    tokens = [f"<extra{i}>" for i in range(VOCABULARY - len(vocabulary))]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
