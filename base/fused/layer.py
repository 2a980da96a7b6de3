"""One decoder layer: two calls of the C library around the attention, or module by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from base import attention_functions
from base.kernels import PLACES, LayerRecord, LinearPlace, NormPlace
from base.nf4 import NF4Linear

from .family import Family
from .step import Step

Angles = tuple[Tensor, Tensor]  # cos, sin [T, dim] or [1, T, dim]

_LINEARS = {
    LinearPlace.Q: "self_attn.q_proj",
    LinearPlace.K: "self_attn.k_proj",
    LinearPlace.V: "self_attn.v_proj",
    LinearPlace.O: "self_attn.o_proj",
    LinearPlace.GATE: "mlp.gate_proj",
    LinearPlace.UP: "mlp.up_proj",
    LinearPlace.DOWN: "mlp.down_proj",
}
_NORMS = {
    NormPlace.INPUT: "input_layernorm",
    NormPlace.BEFORE_MLP: "post_attention_layernorm",
    NormPlace.Q: "self_attn.q_norm",
    NormPlace.K: "self_attn.k_norm",
}
_SANDWICH_NORMS = {
    **_NORMS,
    NormPlace.AFTER_ATTENTION: "post_attention_layernorm",
    NormPlace.BEFORE_MLP: "pre_feedforward_layernorm",
    NormPlace.AFTER_MLP: "post_feedforward_layernorm",
}


class FusedModule(nn.Module):
    """A module in the place of `theirs`, with its children under their names."""

    step: Step

    def __init__(self, theirs: nn.Module, step: Step) -> None:
        super().__init__()
        self.__dict__["step"] = step
        for name, child in theirs.named_children():
            self.add_module(name, child)
        self.train(theirs.training)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.step.version += 1  # a wrapper has come: records of layers are made anew


class FusedNorm(nn.Module):
    """(weight + shift) x / sqrt(mean(x²) + eps) over the last axis."""

    step: Step

    def __init__(self, theirs: Any, family: Family, step: Step) -> None:
        super().__init__()
        self.weight = theirs.weight
        self.eps = float(theirs.eps if hasattr(theirs, "eps") else theirs.variance_epsilon)
        self.shift = family.shift
        self.__dict__["step"] = step

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float().contiguous()
        normed: Tensor = self.step.steps.rms_norm(x.contiguous(), weight, self.eps, self.shift)
        return normed


class FusedMLP(FusedModule):
    """down(act(gate x) ⊙ up x)."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def __init__(self, theirs: nn.Module, step: Step, gate: int) -> None:
        super().__init__(theirs, step)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        inner = self.step.steps.gated(
            self.gate, self.gate_proj(x).contiguous(), self.up_proj(x).contiguous()
        )
        y: Tensor = self.down_proj(inner)
        return y


class FusedAttention(FusedModule):
    """Projections, norms of the heads and rotation; the attention itself is who is registered."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(self, theirs: Any, step: Step, family: Family) -> None:
        super().__init__(theirs, step)
        self.config = theirs.config
        self.layer_idx = int(theirs.layer_idx)
        self.is_causal = bool(theirs.is_causal)
        self.head_dim = int(theirs.head_dim)
        self.heads = int(theirs.config.num_attention_heads)
        self.kv_heads = int(theirs.config.num_key_value_heads)
        self.num_key_value_groups = int(theirs.num_key_value_groups)
        self.scaling = float(theirs.scaling)
        self.asks = _asked(theirs, family)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Angles,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' own way to call it: hidden_states [1, T, hidden]."""
        assert past_key_values is None, "keys and values are the attention function's to keep"
        x, dim = hidden_states, self.head_dim
        cos, sin = (t.reshape(-1, dim).contiguous() for t in position_embeddings)
        q = self.q_proj(x).view(1, -1, self.heads, dim)
        k = self.k_proj(x).view(1, -1, self.kv_heads, dim)
        v = self.v_proj(x).view(-1, self.kv_heads, dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.step.steps.rotary(q[0].contiguous(), cos, sin)
        k = self.step.steps.rotary(k[0].contiguous(), cos, sin)
        return self.o_proj(self.attend(q, k, v).reshape(1, x.shape[1], -1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, dim], k and v [T, kv_heads, dim] -> [1, T, heads, dim]."""
        attention = attention_functions.find(self.config._attn_implementation)
        out: Tensor = attention(
            self,
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            None,
            **self.asks,
        )[0]
        return out.contiguous()


def _asked(theirs: Any, family: Family) -> dict[str, Any]:
    """What this family's attention asks of the attention function."""
    asked: dict[str, Any] = {"dropout": 0.0, "scaling": float(theirs.scaling)}
    window = getattr(theirs, "sliding_window", None)
    if family.name == "Mistral":
        window = getattr(theirs.config, "sliding_window", None)
    if window is not None:
        asked["sliding_window"] = window
    if family.softcap is not None:
        asked["softcap"] = getattr(theirs, family.softcap)
    return asked


class FusedLayer(FusedModule):
    """h + attention(norm h), then that + mlp(norm of it): [1, T, hidden] to the same."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    def __init__(self, theirs: Any, step: Step, family: Family, index: int) -> None:
        super().__init__(theirs, step)
        self.family = family
        self.index = index
        self._made_at = -1  # the step's version when the record was made
        self._record: LayerRecord | None = None
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a record of its own: what it has inside may be something else."""
        return {**self.__dict__, "_record": None, "_made_at": -1, "_hooks": []}

    @property
    def places(self) -> dict[str, int]:
        """Number of each place, by the path within the layer."""
        first = self.index * PLACES
        linears = {path: first + which for which, path in _LINEARS.items()}
        norms = {path: first + len(LinearPlace) + which for which, path in self._norms.items()}
        return {**linears, **norms}

    @property
    def _norms(self) -> dict[NormPlace, str]:
        named = _SANDWICH_NORMS if self.family.sandwich else _NORMS
        return {which: path for which, path in named.items() if _has(self, path)}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Angles | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' own way to call it."""
        assert position_embeddings is not None
        assert past_key_values is None, "keys and values are the attention function's to keep"
        record = self.ready()
        if record is None:
            return self._by_modules(hidden_states, position_embeddings)
        h, step = hidden_states.contiguous(), self.step.record(position_embeddings)
        q, k, v = self.step.halves.open(record, step, h)
        return self.step.halves.close(record, step, h, self.self_attn.attend(q, k, v))

    def _by_modules(self, h: Tensor, angles: Angles) -> Tensor:
        attended = self.self_attn(
            hidden_states=self.input_layernorm(h), position_embeddings=angles
        )[0]
        if not self.family.sandwich:
            h = h + attended
            inner: Tensor = self.mlp(self.post_attention_layernorm(h))
            return h + inner
        h = h + self.post_attention_layernorm(attended)
        inner = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return h + inner

    def ready(self) -> LayerRecord | None:
        """The record, where two calls do all that the modules of this layer would do now."""
        if self._made_at != self.step.version:
            self._made_at = self.step.version
            self._record = self._make_record()
        if self._record is None or self.index in self.step.adapters.apart or any(self._hooks):
            return None
        return self._record

    def _make_record(self) -> LayerRecord | None:
        attention, mlp = self.self_attn, self.mlp
        if type(attention) is not FusedAttention or type(mlp) is not FusedMLP:
            return None
        linears = {which: _inmost(self.get_submodule(path)) for which, path in _LINEARS.items()}
        norms = {which: _inmost(self.get_submodule(path)) for which, path in self._norms.items()}
        if not all(_is_plain(m) for m in linears.values()):
            return None
        if not all(type(m) is FusedNorm and _floats(m.weight) for m in norms.values()):
            return None
        if len({(m.eps, m.shift) for m in norms.values()}) != 1:
            return None
        inside = [m for child in self.children() for m in child.modules()]
        self._hooks = [d for m in inside for d in (m._forward_hooks, m._forward_pre_hooks)]
        first = next(iter(norms.values()))
        return LayerRecord(
            {which: (m.weight, m.bias) for which, m in linears.items()},
            {which: m.weight.detach() for which, m in norms.items()},
            first_place=self.index * PLACES,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            dim=attention.head_dim,
            gate=mlp.gate,
            eps=first.eps,
            shift=first.shift,
            index=attention.layer_idx,
            window=attention.asks.get("sliding_window") or 0,
            scale=attention.scaling,
            softcap=attention.asks.get("softcap") or 0.0,
        )


def _has(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return hasattr(module.get_submodule(parent), name)


def _inmost(module: Any) -> Any:
    """The base's own module within a wrapper whose effect is in the adapters' tables."""
    while getattr(module, "in_tables", False):
        module = module.inner
    return module


def _is_plain(module: Any) -> bool:
    return (
        type(module) is NF4Linear
        and module.weight.on_cpu
        and (module.bias is None or _floats(module.bias))
    )


def _floats(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()
