"""The methods that PEFT trains: its own layers, on the NF4 base.

PEFT dispatches on the class of a layer, so while one of its adapters is attached every NF4Linear
stands behind a `FrozenLinear`, an nn.Linear to it. What is saved is what PEFT itself saves.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from base.load import Base
from base.nf4 import NF4Linear
from training import config as schema
from training.config import TrainConfig
from training.errors import MethodError
from training.methods.files import CONFIG, write_config, write_weights
from training.methods.targets import last_part, put, targets

_NAME = "default"
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class FrozenLinear(nn.Linear):
    """An NF4Linear that passes for an nn.Linear. `weight` is dequantised when it is asked for."""

    def __init__(self, inner: NF4Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.inner.weight.dequantize(torch.float32)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class PeftAdapter:
    """One of PEFT's adapters on the base."""

    def __init__(self, base: Base, config: peft.PeftConfig) -> None:
        self.base, self.config = base, config
        config.base_model_name_or_path = None  # PEFT would warn that ours has another name
        self._own = dict(base.model.named_modules())
        for path, module in self._own.items():
            if isinstance(module, NF4Linear):
                put(base.model, path, FrozenLinear(module))
        try:
            self.model: Any = _wrapped(base, config)
        except Exception as error:
            self.detach()
            if isinstance(error, ValueError | TypeError):
                raise MethodError(f"method {_kind(config)}: {error}") from None
            raise
        self.model.eval()

    @property
    def virtual_tokens(self) -> int:
        return int(getattr(self.config, "num_virtual_tokens", 0) or 0)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def groups(self, b_rate_ratio: float) -> list[dict[str, Any]]:
        if b_rate_ratio != 1.0:
            raise MethodError(
                f"optim.b_rate_ratio is {b_rate_ratio}: only LoRA, rsLoRA and DoRA have a B"
            )
        return [{"params": self.parameters(), "ratio": 1.0}]

    def train(self, on: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.train(on)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def logits(self, tokens: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
        # Where the virtual tokens are embeddings, they have logits of their own at the front.
        embedded = self.config.peft_type in ("PROMPT_TUNING", "P_TUNING")
        keep = columns + self.virtual_tokens if embedded else columns
        output = self.forward(
            input_ids=tokens, attention_mask=mask, logits_to_keep=keep, use_cache=False
        )
        logits: Tensor = output.logits
        return logits

    def penalty(self) -> Tensor | None:
        """AdaLoRA's: how far the factors are from orthogonal, arXiv:2303.10512, equation 4."""
        weight = getattr(self.config, "orth_reg_weight", 0.0)
        if not weight:
            return None
        terms = []
        for name, p in self.model.named_parameters():
            if ("lora_A" in name or "lora_B" in name) and p.requires_grad:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
        return weight * torch.stack(terms).mean()

    def after_update(self, step: int) -> None:
        if self.config.peft_type == "ADALORA":
            self.model.base_model.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"parameters": [p.detach().clone() for p in self.parameters()]}
        allocator = getattr(self.model.base_model, "rankallocator", None)
        if allocator is not None:  # AdaLoRA's memory of how much each part matters
            state["importance"] = {name: dict(getattr(allocator, name)) for name in _IMPORTANCE}
            state["rank_pattern"] = self.config.rank_pattern
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        if state.get("rank_pattern") is not None:
            self.config.rank_pattern = state["rank_pattern"]
        for parameter, kept in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(kept)
        for name, memory in state.get("importance", {}).items():
            getattr(self.model.base_model.rankallocator, name).update(memory)

    def save(self, out: Path) -> None:
        with warnings.catch_warnings():
            # AdaLoRA takes some layers' rank away altogether
            warnings.filterwarnings("ignore", message=".*LoRA tensor.*invalid shape")
            tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        patterns = getattr(self.config, "rank_pattern", None)
        if self.config.peft_type == "ADALORA" and patterns:
            self.config.rank_pattern = _with_a_rank_each(patterns, tensors)
        self.config.inference_mode = True
        self.config.base_model_name_or_path = self.base.spec.id
        out.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(out))
        write_config(out, json.loads((out / CONFIG).read_text(encoding="utf-8")))
        write_weights(out, self.base, tensors)
        self.config.inference_mode = False
        if self.config.peft_type == "ADALORA":
            self.config.rank_pattern = patterns

    def detach(self) -> None:
        for path, module in self._own.items():
            if path and self._at(path) is not module:
                put(self.base.model, path, module)
        if hasattr(self.base.model, "peft_config"):
            del self.base.model.peft_config

    def _at(self, path: str) -> nn.Module | None:
        try:
            found: nn.Module = self.base.model.get_submodule(path)
        except AttributeError:  # a parent has been replaced, and comes first in the order
            return None
        return found


def _wrapped(base: Base, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        # "cannot merge where the base has no bias": nothing is merged here
        warnings.filterwarnings("ignore", message="Detected that the base layer has no")
        # AdaLoRA's pattern names tensors; it is applied when the tensors come
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        # any norm will do for LN tuning
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        # PEFT asks transformers by an old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        return peft.get_peft_model(base.model, config, adapter_name=_NAME)


def _with_a_rank_each(
    patterns: Mapping[str, list[bool]], tensors: dict[str, Tensor]
) -> dict[str, list[bool]]:
    """A layer that AdaLoRA left no rank keeps one of zeros: a tensor of nothing is refused."""
    found = {}
    for name, mask in patterns.items():
        path = name.partition(".lora_E")[0]
        found[name] = mask if any(mask) else [True, *mask[1:]]
        for leaf in () if any(mask) else ("A", "B", "E"):
            full = f"base_model.model.{path}.lora_{leaf}"
            rows, columns = tensors[full].shape
            tensors[full] = tensors[full].new_zeros(rows or 1, columns or 1)
    return found


def _kind(config: peft.PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _names(base: Base, wanted: tuple[str, ...]) -> list[str]:
    """Last parts of module paths, as PEFT takes them."""
    return sorted({last_part(path) for path in targets(base, wanted)})


def _check_divides(field: str, value: int, what: str, widths: set[int]) -> None:
    if any(width % value for width in widths):
        raise MethodError(
            f"method.{field} {value} must divide the {what} {sorted(widths)}; "
            f"{math.gcd(*widths)} does"
        )


def _adalora(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m, steps = run.method, run.optim.steps
    assert isinstance(m, schema.AdaLora)
    if m.initial_rank < m.rank:
        raise MethodError(f"method.initial_rank {m.initial_rank} is below method.rank {m.rank}")
    return peft.AdaLoraConfig(
        target_r=m.rank,
        init_r=m.initial_rank,
        lora_alpha=m.alpha,
        lora_dropout=m.dropout,
        orth_reg_weight=m.orthogonality,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 100),
        total_step=steps,
        target_modules=_names(base, m.targets),
        task_type="CAUSAL_LM",
    )


def _vblora(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.VbLora)
    widths = {w for t in targets(base, m.targets).values() for w in (t.in_features, t.out_features)}
    _check_divides("vector_length", m.vector_length, "widths", widths)
    return peft.VBLoRAConfig(
        r=m.rank,
        num_vectors=m.vectors,
        vector_length=m.vector_length,
        topk=m.topk,
        target_modules=_names(base, m.targets),
        task_type="CAUSAL_LM",
    )


def _vera(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.Vera)
    return peft.VeraConfig(
        r=m.rank,
        d_initial=m.d_initial,
        vera_dropout=m.dropout,
        projection_prng_key=run.seed,
        target_modules=_names(base, m.targets),
        task_type="CAUSAL_LM",
    )


def _ia3(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.Ia3)
    names = _names(base, m.targets)
    return peft.IA3Config(
        target_modules=names,
        feedforward_modules=[name for name in m.feedforward if name in names],
        task_type="CAUSAL_LM",
    )


def _bitfit(base: Base, run: TrainConfig) -> peft.PeftConfig:
    assert isinstance(run.method, schema.BitFit)
    return peft.BeftConfig(target_modules=_names(base, run.method.targets), task_type="CAUSAL_LM")


def _ln_tuning(base: Base, run: TrainConfig) -> peft.PeftConfig:
    assert isinstance(run.method, schema.LnTuning)
    return peft.LNTuningConfig(target_modules=list(run.method.targets), task_type="CAUSAL_LM")


def _oft(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.Oft)
    widths = {target.in_features for target in targets(base, m.targets).values()}
    _check_divides("block_size", m.block_size, "input widths", widths)
    return peft.OFTConfig(
        r=0,
        oft_block_size=m.block_size,
        module_dropout=m.dropout,
        target_modules=_names(base, m.targets),
        task_type="CAUSAL_LM",
    )


def _waveft(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.WaveFt)
    return peft.WaveFTConfig(
        n_frequency=m.coefficients,
        scaling=m.scaling,
        random_loc_seed=run.seed,
        target_modules=_names(base, m.targets),
        task_type="CAUSAL_LM",
    )


def _prompt_tuning(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.PromptTuning)
    return peft.PromptTuningConfig(num_virtual_tokens=m.virtual_tokens, task_type="CAUSAL_LM")


def _p_tuning(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.PTuning)
    return peft.PromptEncoderConfig(
        num_virtual_tokens=m.virtual_tokens, encoder_hidden_size=m.hidden, task_type="CAUSAL_LM"
    )


def _prefix_tuning(base: Base, run: TrainConfig) -> peft.PeftConfig:
    m = run.method
    assert isinstance(m, schema.PrefixTuning)
    return peft.PrefixTuningConfig(
        num_virtual_tokens=m.virtual_tokens,
        prefix_projection=m.projection,
        encoder_hidden_size=m.hidden if m.projection else None,
        task_type="CAUSAL_LM",
    )


def _prompt_attach(base: Base, run: TrainConfig) -> PeftAdapter:
    """Prompt tuning starts at embeddings of real tokens: a text's, or some drawn at random."""
    adapter = PeftAdapter(base, _prompt_tuning(base, run))
    m = run.method
    assert isinstance(m, schema.PromptTuning)
    table = base.model.get_input_embeddings().weight
    if m.init_text is None:
        ids = torch.randint(0, table.shape[0], (m.virtual_tokens,))
    else:
        said = base.tokenizer.encode(m.init_text, add_special_tokens=False)
        if not said:
            raise MethodError("method.init_text has no token")
        ids = torch.tensor((said * m.virtual_tokens)[: m.virtual_tokens])
    with torch.no_grad():
        adapter.model.prompt_encoder[_NAME].embedding.weight.copy_(table[ids.to(table.device)])
    return adapter


_CONFIGS: Mapping[str, Callable[[Base, TrainConfig], peft.PeftConfig]] = {
    "adalora": _adalora,
    "bitfit": _bitfit,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "oft": _oft,
    "p_tuning": _p_tuning,
    "prefix_tuning": _prefix_tuning,
    "vblora": _vblora,
    "vera": _vera,
    "waveft": _waveft,
}


def attach(base: Base, run: TrainConfig) -> PeftAdapter:
    """A fresh adapter of the run's method."""
    kind = run.method.kind
    return (
        _prompt_attach(base, run)
        if kind == "prompt_tuning"
        else PeftAdapter(base, _CONFIGS[kind](base, run))
    )
