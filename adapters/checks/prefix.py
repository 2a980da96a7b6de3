"""Virtual tokens before every prompt: prompt tuning, multitask prompt tuning, P-tuning, CPT (as
rows of embeddings), prefix tuning and cartridges (as keys and values).

PEFT saves what a prompt encoder or a projection gives, not the encoder: how it was made no longer
matters. Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning"; Wang et
al. 2023, "Multitask Prompt Tuning"; Liu et al. 2021, "GPT Understands, Too"; Blau et al. 2024,
"Context-aware Prompt Tuning"; Li and Liang 2021, "Prefix-Tuning"; Eyuboglu et al. 2025,
"Cartridges".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Checker, Validated, numbers
from adapters.checks.modules import whole_modules
from adapters.config_rules import COMMON, Rule, TargetFields, apply_rules, ignore, one_of, present
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, SHARED, Expected, consume
from adapters.safetensors_header import Header
from adapters.targets import saved_modules
from base.spec import BaseSpec

TENSOR = "prompt_embeddings"
METHODS_OF_KEYS = ("PREFIX_TUNING", "CARTRIDGE")  # the others save rows of embeddings


def _count(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected an integer from 1", name)


def _from_zero(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or value < 0):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected an integer from 0", name)


def _one_task(name: str, value: Any) -> None:
    if value not in (None, 1):
        raise InvalidAdapter(
            f"{str(value)[:80]}, and a request cannot say which task it means: save one task, its "
            "row of prefix_task_cols and prefix_task_rows, with num_tasks 1",
            name,
        )


def _token_ids(name: str, value: Any) -> None:
    whole = isinstance(value, list) and all(type(token) is int for token in value)
    if value is not None and not (whole and value):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected a list of token ids", name)


RULES: Mapping[str, Rule] = {
    **{name: rule for name, rule in COMMON.items() if name != "target_modules"},
    "num_virtual_tokens": _count,
    "token_dim": _count,
    "num_layers": _count,
    "num_attention_heads": _count,
    "num_transformer_submodules": one_of(1),
}
_INIT: Mapping[str, Rule] = dict.fromkeys(
    # How training began. The path and the tokenizer's name are never opened.
    (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    ),
    ignore,
)
_OWN: Mapping[str, Mapping[str, Rule]] = {
    "PROMPT_TUNING": {k: v for k, v in _INIT.items() if "state_dict" not in k and "task" not in k},
    "MULTITASK_PROMPT_TUNING": {**_INIT, "num_ranks": _count, "num_tasks": _one_task},
    "P_TUNING": dict.fromkeys(
        (
            "encoder_reparameterization_type",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_dropout",
        ),
        ignore,
    ),
    "CPT": {
        "cpt_token_ids": _token_ids,
        **dict.fromkeys(
            (
                "cpt_mask",  # these bound and weigh the training alone
                "cpt_tokens_type_mask",
                "opt_weighted_loss_type",
                "opt_loss_decay_factor",
                "opt_projection_epsilon",
                "opt_projection_format_epsilon",
                "tokenizer_name_or_path",
            ),
            ignore,
        ),
    },
    "PREFIX_TUNING": dict.fromkeys(
        ("encoder_hidden_size", "prefix_projection", "init_weights"), ignore
    ),
    "CARTRIDGE": {"num_frozen_tokens": _from_zero},
}
RULES_OF: Mapping[str, Mapping[str, Rule]] = {
    method: {**RULES, **own} for method, own in _OWN.items()
}


def check_prefix(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale: what bounds a prefix is the base's context
    method = str(config["peft_type"])
    apply_rules(config, RULES_OF[method])
    tokens = _virtual_tokens(config, method, spec)
    _same_shape(config, method, spec)
    saved = _saved(config, method, spec)
    promised = _promised(config, method, tokens, spec)
    for name, expected in whole_modules(spec, saved).items():
        # PEFT puts one wrapper less around the base of these methods.
        promised[SHARED + name.removeprefix(PREFIX)] = expected
    extra = next((name for name in header.tensors if name not in promised), None)
    if extra:
        raise InvalidAdapter(f"left over: {method} has only {', '.join(promised)[:200]}", extra)
    found = consume(header.tensors, promised, spec, ())
    kept = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens
    canonical: dict[str, Any] = {
        "peft_type": method,
        "num_virtual_tokens": tokens,
        "modules_to_save": saved or None,
    }
    if method == "MULTITASK_PROMPT_TUNING":
        canonical["num_ranks"] = int(present(config, "num_ranks"))
    return Checked(
        Validated(
            kind=method.lower(),
            rank=0,
            targets=tuple(saved),
            config=canonical,
            parameters=numbers(found),
            memory_bytes=4 * (kept + numbers(found, "saved")),
        )
    )


CHECKERS_OF_PREFIXES: Mapping[str, Checker] = dict.fromkeys(_OWN, check_prefix)


def _virtual_tokens(config: Mapping[str, Any], method: str, spec: BaseSpec) -> int:
    """How many virtual tokens there are: PEFT counts CPT's token ids, whatever the number says."""
    tokens = int(present(config, "num_virtual_tokens"))
    if method == "CPT":
        counted = len(present(config, "cpt_token_ids"))
        if counted != tokens:
            raise InvalidAdapter(
                f"{tokens}, and there are {counted} cpt_token_ids: expected as many",
                "num_virtual_tokens",
            )
    if tokens < int(config.get("num_frozen_tokens") or 0):
        raise InvalidAdapter(
            f"{config['num_frozen_tokens']}, and there are {tokens} virtual tokens",
            "num_frozen_tokens",
        )
    check_room(tokens, spec.max_positions, "base")
    return tokens


def check_room(tokens: int, positions: int, owner: str) -> None:
    """A prompt and an answer of one token each must fit behind the prefix.

    Raises InvalidAdapter, naming the numbers.
    """
    if tokens > positions - 2:
        raise InvalidAdapter(
            f"{tokens} virtual tokens, and the context of this {owner} is {positions}: at most "
            f"{positions - 2} leave room for a prompt and an answer",
            "num_virtual_tokens",
        )


def _same_shape(config: Mapping[str, Any], method: str, spec: BaseSpec) -> None:
    """The shape of a layer's part, where the config states it, is the base's."""
    of_keys = method in METHODS_OF_KEYS
    wanted = {"num_layers": spec.num_layers}
    wanted["token_dim"] = spec.num_kv_heads * spec.head_dim if of_keys else spec.hidden_size
    if of_keys:
        wanted["num_attention_heads"] = spec.num_kv_heads
    for name, right in wanted.items():
        if config.get(name) not in (None, right):
            raise InvalidAdapter(f"{config[name]}, expected {right} for this base", name)


def _saved(config: Mapping[str, Any], method: str, spec: BaseSpec) -> list[str]:
    names = tuple(config.get("modules_to_save") or ())
    saved = sorted(saved_modules(TargetFields((), (), names, None, (), False), spec))
    table = next((path for path in saved if path in spec.embeddings), None)
    if table and method not in METHODS_OF_KEYS:
        raise InvalidAdapter(
            f"{table}: with {method} PEFT reads a prompt's embeddings from the base's own table "
            "and those of generated tokens from the saved one, so neither alone is right",
            "modules_to_save",
        )
    return saved


def _promised(
    config: Mapping[str, Any], method: str, tokens: int, spec: BaseSpec
) -> dict[str, Expected]:
    """The method's own tensors, without modules_to_save."""
    why = f" for {tokens} virtual tokens"
    if method in METHODS_OF_KEYS:
        width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        return {TENSOR: Expected("", (tokens, width), "keys", why)}
    promised = {TENSOR: Expected("", (tokens, spec.hidden_size), "embeddings", why)}
    if method == "MULTITASK_PROMPT_TUNING":
        ranks = int(present(config, "num_ranks"))
        promised["prefix_task_cols"] = Expected("", (1, tokens, ranks), "factor", why)
        promised["prefix_task_rows"] = Expected("", (1, ranks, spec.hidden_size), "factor")
    return promised
