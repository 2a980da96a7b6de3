"""A recipe for every kind of adapter that is served: PEFT's config, and random weights that matter.

One row in `RECIPES` for a kind. `make_adapter` lets PEFT itself save it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.scales import double_quant_of
from service.conformance.oracle import VIRTUAL_KINDS, dequantised_model, ready_peft

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = ATTENTION + FEED_FORWARD

INVOCATION = (7, 9)  # tokens that activate an aLoRA

Targets = Sequence[str] | str


@dataclass(frozen=True, slots=True)
class Recipe:
    """One kind: the fields of its config from (rank, alpha, targets), and what it adapts."""

    fields: Callable[[int, float, Targets], Mapping[str, Any]]
    targets: Targets | None = ALL_LINEARS  # None: the method has no such field
    peft_type: str = ""  # by default the kind in capitals
    begins_random: str = ""  # why it is not the base as PEFT initialises it; "": it is
    new_tokens: int = 0  # the vocabulary is resized by so many before


def _lora(**more: Any) -> Recipe:
    return Recipe(lambda r, a, t: {"r": r, "lora_alpha": a, **more}, peft_type="LORA")


def _with_tokens(**more: Any) -> Recipe:
    """`trainable_token_indices` below 0 count from the end of the resized vocabulary."""
    fields = _lora(**more).fields
    return Recipe(fields, peft_type="LORA", begins_random="new rows begin at random", new_tokens=5)


_RANDOM_TOKENS = "virtual tokens begin at random"
_VIRTUAL = Recipe(lambda r, a, t: {"num_virtual_tokens": r}, None, begins_random=_RANDOM_TOKENS)

RECIPES: Mapping[str, Recipe] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "alora": _lora(alora_invocation_tokens=list(INVOCATION)),
    "adalora": Recipe(lambda r, a, t: {"init_r": r, "lora_alpha": a, "total_step": 10}),
    "loha": Recipe(lambda r, a, t: {"r": r, "alpha": a}),
    "vera": Recipe(lambda r, a, t: {"r": r}),
    "vblora": Recipe(
        lambda r, a, t: {"r": r, "num_vectors": 12, "vector_length": 16},
        begins_random="its vector bank begins at random",
    ),
    "miss": Recipe(lambda r, a, t: {"r": r}),
    "ia3": Recipe(
        lambda r, a, t: {"feedforward_modules": [name for name in t if name in FEED_FORWARD]}
    ),
    "beft": Recipe(lambda r, a, t: {}),
    "ln_tuning": Recipe(lambda r, a, t: {}, ("input_layernorm", "model.norm")),
    "oft": Recipe(lambda r, a, t: {"r": 0, "oft_block_size": 2 * r}),
    "boft": Recipe(lambda r, a, t: {"boft_block_size": 2 * r}),
    "road": Recipe(lambda r, a, t: {"group_size": 2 * r}),
    "shira": Recipe(lambda r, a, t: {"r": r, "random_seed": 1}),
    "supertuning": Recipe(lambda r, a, t: {"r": r, "lora_alpha": a, "sparsity": 0.9}),
    "tinylora": Recipe(lambda r, a, t: {"r": r, "u": 8}),
    "unilora": Recipe(
        lambda r, a, t: {"r": r, "theta_d_length": 100},
        begins_random="its vector begins at random",
    ),
    "pvera": Recipe(lambda r, a, t: {"r": r}),
    "lokr": Recipe(lambda r, a, t: {"r": r, "alpha": a}),
    "glora": Recipe(lambda r, a, t: {"r": r}),
    "waveft": Recipe(lambda r, a, t: {"n_frequency": 300}),
    "hra": Recipe(lambda r, a, t: {"r": r}),
    "delora": Recipe(lambda r, a, t: {"r": r}),
    "gralora": Recipe(lambda r, a, t: {"r": r, "alpha": a}),
    "deft": Recipe(
        lambda r, a, t: {"r": r, "alpha": a},
        begins_random="it begins as a part of the weights that it was made for",
    ),
    "hira": Recipe(lambda r, a, t: {"r": r}),
    "c3a": Recipe(lambda r, a, t: {"block_size": 4 * r, "init_weights": True}),
    "fourierft": Recipe(lambda r, a, t: {"n_frequency": 50, "init_weights": True}),
    "randlora": Recipe(lambda r, a, t: {"r": r, "randlora_alpha": 10 * a}),
    "peanut": Recipe(lambda r, a, t: {"r": r, "depth": 1, "scaling": a / r}),
    "poly": Recipe(lambda r, a, t: {"r": r}),
    "trainable_tokens": Recipe(lambda r, a, t: {"token_indices": [7, 300, 11]}, ("embed_tokens",)),
    # A LoRA after resize_token_embeddings; then one with whole tables, one that trains the rows.
    "new_tokens": _with_tokens(),
    "new_tokens_saved": _with_tokens(modules_to_save=["embed_tokens", "lm_head"]),
    "new_tokens_trained": _with_tokens(trainable_token_indices=[7, -2, -1]),
    **dict.fromkeys(VIRTUAL_KINDS, _VIRTUAL),
    "cpt": Recipe(
        lambda r, a, t: {
            "cpt_token_ids": [7 + i for i in range(r)],
            "cpt_tokens_type_mask": [1 + i % 4 for i in range(r)],
        },
        None,
        begins_random="its tokens stand before the prompt from the start",
    ),
}

# Served, and no method of PEFT: who compares them, and with what.
ELSEWHERE: Mapping[str, str] = {
    "bottleneck": "tests/adapters/lowering/test_bottleneck.py compares it with its equation",
}

# By a part of a tensor's name, the first that fits: what it becomes. Noise has the strength of
# `make_adapter`. What no row names stays as PEFT initialised it.
_Fill = Callable[[Tensor, Tensor, float], Tensor]
_FILLS: tuple[tuple[tuple[str, ...], _Fill], ...] = (
    (("lora_magnitude_vector", "road_alpha", "boft_s"), lambda own, noise, s: own * (1 + noise)),
    (("ia3_l",), lambda own, noise, s: own * (1 + 3 * noise)),
    (("hada_", "vera_lambda", "tinylora_v", "unilora_theta"), lambda own, noise, s: 3 * noise),
    (
        ("road_theta", "peanut_", "trainable_tokens_delta"),
        lambda own, noise, s: own + 3 * noise,
    ),
    (("oft_R", "shira_weight", "supertuning_", "poly_lora_B"), lambda own, noise, s: own + noise),
    (
        (
            "lokr_",
            "glora_",
            "waveft_",
            "hra_u",
            "delora_",
            "gralora_B",
            "deft_",
            "hira_",
            "fourierft_",
            "randlora_lambda",
        ),
        lambda own, noise, s: own + noise,
    ),
    (("c3a_kernel",), lambda own, noise, s: own + 10 * noise),
    (
        ("lora_E", "vblora_logits", "prefix_task_", "module_logits"),
        lambda own, noise, s: noise / s,
    ),
    (
        ("ln_tuning", "miss_", "beft_bias", "delta_embedding"),
        lambda own, noise, s: own + noise,
    ),
    (("lora_embedding", "lora_B", "vblora_vector_bank"), lambda own, noise, s: noise),
    (("modules_to_save",), lambda own, noise, s: own + noise),
)


def make_adapter(
    directory: str | Path,
    base: str | Path,
    kind: str = "lora",
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Targets | None = None,
    seed: int = 0,
    zero: bool = False,
    strength: float = 0.1,
    over_nf4: bool = False,
    new_tokens: int | None = None,
    **config: Any,
) -> Path:
    """Save a random adapter by PEFT itself, for the base in the directory `base`.

    kind      a row of `RECIPES`: "lora" | "rslora" | "dora" | "ia3" | ...
    targets   module names as PEFT takes them, "lm_head" and "embed_tokens" among them; by default
              the recipe's
    alpha     2 * rank by default
    zero      keep PEFT's initialisation, which changes nothing for most kinds
    strength  standard deviation of the random B; magnitudes and saved modules move with it, and
              embedding factors too
    new_tokens  resize the vocabulary by so many first, and save a tokenizer that names them
              ("<new0>", ...) beside the adapter; fewer than 0 cut it. By default the recipe's
    over_nf4  start over the weights as NF4 rounds them, where a start depends on them (DoRA)
    config    any other field of the method's config: rank_pattern, alpha_pattern, lora_bias, bias,
              modules_to_save, layers_to_transform, exclude_modules, ...

    Writes adapter_config.json and adapter_model.safetensors; returns the directory.
    """
    from peft import get_peft_model

    ready_peft()
    directory, recipe = Path(directory), RECIPES[kind]
    model = _float_model(base, over_nf4)
    more = recipe.new_tokens if new_tokens is None else new_tokens
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed + 1)
        if more:
            _resize(model, more)
        settings = _settings(kind, rank, 2 * rank if alpha is None else alpha, targets, config)
        _count_from_the_end(settings, model.config.vocab_size)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
        if not zero:
            _randomise(adapted, strength)
        adapted.save_pretrained(str(directory), safe_serialization=True)
    if more > 0:
        _save_tokenizer(directory, base, model.config.vocab_size)
    return directory


def _float_model(base: str | Path, over_nf4: bool) -> Any:
    """A model of its own, in fp32."""
    if over_nf4:
        return copy.deepcopy(dequantised_model(str(base), double_quant_of(Path(base))))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)


def _settings(
    kind: str, rank: int, alpha: float, targets: Targets | None, more: Mapping[str, Any]
) -> Any:
    """PEFT's config of the recipe; `more` wins over what it says."""
    recipe = RECIPES[kind]
    places = targets or recipe.targets or ()
    fields = {
        "task_type": "CAUSAL_LM",
        **({} if recipe.targets is None else {"target_modules": _listed(places)}),
        **recipe.fields(rank, alpha, places),
        **more,
    }
    return _config_class(recipe.peft_type or kind.upper())(**fields)


def _resize(model: Any, more: int) -> None:
    """New rows of the strength of the others, so that leaving them out is seen."""
    model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    if more > 0:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = table.weight.data[-more:]
            rows.copy_(torch.randn_like(rows) * table.weight.data[:-more].std())


def _count_from_the_end(settings: Any, vocabulary: int) -> None:
    tokens = getattr(settings, "trainable_token_indices", None)
    if isinstance(tokens, list):
        settings.trainable_token_indices = [t % vocabulary for t in tokens]


def _save_tokenizer(directory: Path, base: str | Path, vocabulary: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_tokens([f"<new{i}>" for i in range(vocabulary - len(tokenizer))])
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def _config_class(name: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]


def _listed(targets: Targets) -> list[str] | str:
    return targets if isinstance(targets, str) else list(targets)


def _randomise(adapted: nn.Module, strength: float) -> None:
    """Make each trainable tensor say something, so that dropping one is seen.

    In place: with ensure_weight_tying two of them share their memory, and must go on doing so.
    """
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = strength * torch.randn_like(parameter)
        fill = next((f for parts, f in _FILLS if any(part in name for part in parts)), None)
        if fill is not None:
            parameter.data.copy_(fill(parameter.data, noise, strength))
        elif name.endswith("bias"):
            parameter.data += noise
