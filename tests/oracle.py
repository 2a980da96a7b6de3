"""The oracle: PEFT itself, one adapter at a time, in fp32, over the same NF4 weights.

Slow and obvious. A float model is loaded, each decoder linear is quantised and dequantised by
bitsandbytes, and PEFT applies one adapter to it: what any faster path must equal.

    base = make_base(tmp_path / "base", "qwen3")
    adapter = make_adapter(tmp_path / "a", base, "dora", rank=4)
    oracle = PeftOracle(base, adapter)
    oracle.logits([1, 2, 3])            # [3, vocabulary]
    oracle.greedy([1, 2, 3], 16).tokens

The makers below write tiny random bases and random adapters. Everything is seeded.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from adapters.limits import Limits
from adapters.manifest import AdapterManifest, adapter_digest
from adapters.validate import validate
from base.spec import BaseSpec

transformers_logging.disable_progress_bar()

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
TIED = {"llama": False, "qwen2": True, "qwen3": False, "mistral": False, "gemma": True}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = ATTENTION + FEED_FORWARD
VIRTUAL_KINDS = (
    "prompt_tuning",
    "multitask_prompt_tuning",
    "p_tuning",
    "cpt",
    "prefix_tuning",
    "cartridge",
)
VOCABULARY = 512


class Greedy(NamedTuple):
    """Greedy tokens, and at each step how far the best logit stood above the second.

    Where `gaps[i]` is tiny (say below 1e-4) the choice is a tie, and a rounding may decide it.
    """

    tokens: list[int]
    gaps: list[float]


class PeftOracle:
    """One adapter, or none, over one base.

    base     directory of a transformers checkpoint, or a `Base`: its tensors are read back
    adapter  directory that PEFT saved (adapter_config.json, adapter_model.safetensors), or None
    merged   None: PEFT's unmerged forward. "float32", "bfloat16", "nf4": PEFT merges into the
             dequantised weights, and the merged linears are rounded to that dtype: the oracle of
             placement `merged`.
    """

    def __init__(
        self,
        base: str | Path | Any,
        adapter: str | Path | None = None,
        *,
        merged: str | None = None,
        double_quant: bool = False,
    ) -> None:
        if isinstance(base, str | Path):
            model = copy.deepcopy(_dequantised_model(str(base), double_quant))
        else:
            model = _model_of(base)
        if adapter is not None:
            model = _with_adapter(model, Path(adapter), merged)
        self.model: Any = model.eval()
        method = getattr(getattr(model, "active_peft_config", None), "peft_type", "").lower()
        self._virtual = method in VIRTUAL_KINDS
        multitask = method == "multitask_prompt_tuning"
        self._task: dict[str, Any] = {"task_ids": torch.tensor([0])} if multitask else {}

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [T, vocabulary] of one sequence, each position seeing itself and those before."""
        own = {} if self._virtual else {"use_cache": False}
        output = self.model(input_ids=torch.tensor([list(token_ids)]), **own, **self._task)
        # Rows of virtual tokens come before those of real ones.
        logits: torch.Tensor = output.logits[0, -len(token_ids) :].float().clone()
        return logits

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], n: int, *, stop: Collection[int] = ()) -> Greedy:
        """At most n tokens after `prompt`; ends early after a token of `stop` (which is kept)."""
        if self._virtual:
            return self._generate(prompt, n, stop)
        tokens: list[int] = []
        gaps: list[float] = []
        cache, fresh = None, list(prompt)
        while len(tokens) < n and not (tokens and tokens[-1] in stop):
            output = self.model(
                input_ids=torch.tensor([fresh]), past_key_values=cache, use_cache=True
            )
            best, second = output.logits[0, -1].float().topk(2).values.tolist()
            fresh = [int(output.logits[0, -1].argmax())]
            cache = output.past_key_values
            tokens += fresh
            gaps.append(best - second)
        return Greedy(tokens, gaps)

    def _generate(self, prompt: Sequence[int], n: int, stop: Collection[int]) -> Greedy:
        """`greedy` by PEFT's own loop: its forward pass puts the virtual tokens before each call's
        tokens, so that a loop outside must not call it once for each."""
        ids = torch.tensor([list(prompt)])
        self.model.generation_config.eos_token_id = list(stop) or None
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **self._task,
        )
        best = torch.stack(output.logits)[:, 0].float().topk(2).values
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        return Greedy(tokens, (best[:, 0] - best[:, 1]).tolist())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| over the largest |want|."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """n ids of the makers' vocabulary, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(6, VOCABULARY, (n,), generator=generator).tolist()
    return ids


def nf4_round(weight: torch.Tensor, double_quant: bool = False) -> torch.Tensor:
    """A weight as NF4 in blocks of 64 keeps it, in fp32; by bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.detach().float().contiguous(),
        blocksize=64,
        quant_type="nf4",
        compress_statistics=double_quant,
    )
    rounded: torch.Tensor = dequantize_4bit(packed, state).float()
    return rounded


@lru_cache(maxsize=8)
def _dequantised_model(directory: str, double_quant: bool) -> Any:
    """The checkpoint in fp32, its decoder linears rounded to NF4. Copy before changing it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = nf4_round(module.weight, double_quant)
    return model


def _model_of(base: Any) -> Any:
    """A float model with the very tensors that a `Base` holds."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base.model.config)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kept = {
        name.replace(".inner.", ".").removesuffix(".inner"): tensor
        for name, tensor in base.model.state_dict().items()
    }
    for path, shape in base.spec.linears.items():
        if shape.quantized:
            linear = base.linear(path)
            linear = getattr(linear, "inner", linear)
            kept[f"{path}.weight"] = linear.weight.dequantize(torch.float32)
    names = set(model.state_dict())
    model.load_state_dict({k: v.float() for k, v in kept.items() if k in names}, strict=True)
    return model


def _with_adapter(model: nn.Module, adapter: Path, merged: str | None) -> Any:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter))
        if merged is None:
            return peft_model
        touched = [
            name.removeprefix("base_model.model.")
            for name, module in peft_model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        plain = peft_model.merge_and_unload(safe_merge=True)
    head = plain.get_output_embeddings()
    for name in touched:
        layer = plain.get_submodule(name)
        quantised = isinstance(layer, nn.Linear) and layer is not head
        if merged == "nf4" and quantised:
            layer.weight.data = nf4_round(layer.weight)
        elif merged in ("bfloat16", "nf4"):
            layer.weight.data = layer.weight.data.bfloat16().float()
    return plain


# --- makers ---------------------------------------------------------------------------------


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
    _tokenizer().save_pretrained(directory)
    return directory


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tokenizer() -> Any:
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
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_adapter(
    directory: str | Path,
    base: str | Path,
    kind: str = "lora",
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] | str = ALL_LINEARS,
    seed: int = 0,
    zero: bool = False,
    strength: float = 0.1,
    **config: Any,
) -> Path:
    """Save a random adapter by PEFT itself, for the base in the directory `base`.

    kind      "lora" | "rslora" | "dora", or another method of PEFT in lower case: "ia3", ...
    targets   module names as PEFT takes them, "lm_head" and "embed_tokens" among them
    alpha     2 * rank by default
    zero      keep PEFT's initialisation, which changes nothing
    strength  standard deviation of the random B; magnitudes and saved modules move with it, and
              embedding factors too
    config    any other field of the method's config: rank_pattern, alpha_pattern, lora_bias, bias,
              modules_to_save, layers_to_transform, exclude_modules, ...

    Writes adapter_config.json and adapter_model.safetensors; returns the directory.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        settings = _config_class(kind)(
            **{
                "task_type": "CAUSAL_LM",
                **({} if kind in VIRTUAL_KINDS else {"target_modules": _listed(targets)}),
                **_own_fields(kind, rank, 2 * rank if alpha is None else alpha, targets),
                **config,
            }
        )
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
        if not zero:
            _randomise(adapted, strength)
        adapted.save_pretrained(str(directory), safe_serialization=True)
    return directory


def _listed(targets: Sequence[str] | str) -> list[str] | str:
    return targets if isinstance(targets, str) else list(targets)


def _config_class(kind: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name = "LORA" if kind in ("rslora", "dora") else kind.upper()
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]


def _own_fields(kind: str, rank: int, alpha: float, targets: Sequence[str] | str) -> dict[str, Any]:
    """The fields of one method's config that the arguments of `make_adapter` stand for."""
    own: dict[str, dict[str, Any]] = {
        "ia3": {"feedforward_modules": [name for name in targets if name in FEED_FORWARD]},
        "loha": {"r": rank, "alpha": alpha},
        "adalora": {"init_r": rank, "lora_alpha": alpha, "total_step": 10},
        "vera": {"r": rank},
        "vblora": {"r": rank, "num_vectors": 12, "vector_length": 16},
        "miss": {"r": rank},
        "ln_tuning": {},
        "beft": {},
        **{name: {"num_virtual_tokens": rank} for name in VIRTUAL_KINDS if name != "cpt"},
        "cpt": {
            "cpt_token_ids": [7 + i for i in range(rank)],
            "cpt_tokens_type_mask": [1 + i % 4 for i in range(rank)],
        },
        "trainable_tokens": {},
    }
    lora = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": kind == "rslora",
        "use_dora": kind == "dora",
    }
    return own.get(kind, lora)


def _randomise(adapted: nn.Module, strength: float) -> None:
    """Make each trainable tensor say something, so that dropping one is seen.

    In place: with ensure_weight_tying two of them share their memory, and must go on doing so.
    """
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = strength * torch.randn_like(parameter)
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + noise
        elif "ia3_l" in name:
            parameter.data *= 1 + 3 * noise
        elif "hada_" in name or "vera_lambda" in name:
            parameter.data.copy_(3 * noise)
        elif "trainable_tokens_delta" in name:
            parameter.data += 3 * noise
        elif any(part in name for part in ("lora_E", "vblora_logits", "prefix_task_")):
            parameter.data.copy_(noise / strength)
        elif any(part in name for part in ("ln_tuning", "miss_", "beft_bias", "delta_embedding")):
            parameter.data += noise
        elif any(part in name for part in ("lora_embedding", "lora_B", "vblora_vector_bank")):
            parameter.data.copy_(noise)
        elif "modules_to_save" in name or name.endswith("bias"):
            parameter.data += noise


def read_manifest(adapter: str | Path, spec: BaseSpec, **fields: Any) -> AdapterManifest:
    """The manifest of a saved adapter, validated as an upload is but kept in no store."""
    adapter = Path(adapter)
    config = (adapter / "adapter_config.json").read_bytes()
    weights = adapter / "adapter_model.safetensors"
    found = validate(config, weights, spec, Limits())
    content = weights.read_bytes()
    address = sha256(content).hexdigest()
    own: dict[str, Any] = {
        "digest": adapter_digest(address, found.config, spec.fingerprint),
        "name": adapter.name,
        "version": 1,
        "kind": found.kind,
        "rank": found.rank,
        "targets": found.targets,
        "base_fingerprint": spec.fingerprint,
        "config": found.config,
        "weights_sha256": address,
        "weights_bytes": len(content),
        "memory_bytes": found.memory_bytes,
    }
    return AdapterManifest(**{**own, **fields})


def edit_adapter(
    directory: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """Damage a saved adapter: overwrite config fields and tensors (None removes one)."""
    directory = Path(directory)
    if config is not None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    if tensors is not None:
        weights = directory / "adapter_model.safetensors"
        kept: dict[str, torch.Tensor | None] = {**load_file(str(weights)), **tensors}
        save_file({k: v for k, v in kept.items() if v is not None}, str(weights))
    return directory
