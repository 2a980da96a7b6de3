"""The whole decoder: embedding, layers, norm, head; and how it comes to stand in a model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from base import kernels
from base.kernels import LayerRecord, StepPages

from .family import Family, family_of, gate_of
from .layer import FusedAttention, FusedLayer, FusedMLP, FusedNorm
from .rotary import RotaryTable
from .step import Step


class Decoder:
    """A fused model's forward pass over one step's tokens."""

    def __init__(self, model: Any, family: Family, step: Step) -> None:
        self.model = model
        self.step = step
        config = model.config
        self._softcap = getattr(config, "final_logit_softcapping", None)
        types = config.layer_types if family.rotary_by_type else [None]
        rotary = model.model.rotary_emb
        self._tables = {kind: RotaryTable(rotary, kind) for kind in dict.fromkeys(types)}
        self._kinds = types if family.rotary_by_type else [None] * config.num_hidden_layers

    @property
    def places(self) -> dict[str, int]:
        """Number of each linear and norm of the layers in an adapter's table, by module path."""
        return {
            f"model.layers.{layer.index}.{path}": place
            for layer in self.model.model.layers
            for path, place in layer.places.items()
        }

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        pages: StepPages | None = None,
    ) -> Tensor:
        """input_ids, position_ids [1, T] -> logits [L, vocabulary] of rows [L] of T.

        `pages`: where the attention that is registered would find this step's keys and values;
        layers that nothing else has a part in then run in C alone.
        """
        inner = self.model.model
        h = inner.embed_tokens(input_ids)
        positions = position_ids.reshape(-1)
        angles = {kind: table.at(positions) for kind, table in self._tables.items()}
        records = {kind: self.step.fresh_record(own) for kind, own in angles.items()}
        ready = [None if pages is None else _whole(layer) for layer in inner.layers]
        parts = zip(self._kinds, inner.layers, ready, strict=True)
        for whole, group in itertools.groupby(parts, key=lambda part: part[2] is not None):
            if whole and pages is not None:
                run = [(records[kind], record) for kind, _, record in group if record is not None]
                steps, layers = zip(*run, strict=True)
                h = self.step.halves.run(layers, steps, pages, h.contiguous())
            else:
                for kind, layer, _ in group:
                    h = layer(h, position_embeddings=angles[kind])
        h = inner.norm(h)
        logits: Tensor = self.model.lm_head(h[:, rows])[0]
        if self._softcap is not None:
            logits = self.step.steps.softcap(logits.contiguous(), float(self._softcap))
        return logits


def _whole(layer: FusedLayer) -> LayerRecord | None:
    """Its record, where nothing wants to see this layer or to be called in it."""
    return None if layer._forward_hooks or layer._forward_pre_hooks else layer.ready()


def can_fuse(model: Any) -> bool:
    """Would `fuse` swap the modules of this model, filled and on its device?"""
    family = family_of(model)
    return (
        kernels.steps() is not None
        and kernels.decoder_halves() is not None
        and family is not None
        and _fits(model, family)
    )


def fuse(model: Any) -> Decoder | None:
    """Swap the modules of `model` for fused ones; None, and nothing done, where that cannot be:
    another class, a device or dtype without C functions, parts that are not as expected.

    Do it before wrappers come: they then stand around the fused modules.
    """
    steps, halves, family = kernels.steps(), kernels.decoder_halves(), family_of(model)
    if steps is None or halves is None or family is None or not can_fuse(model):
        return None
    gate, config = gate_of(model.config), model.config
    assert gate is not None
    step = Step(steps, halves, config.hidden_size, config.intermediate_size)
    for path, norm in [(p, m) for p, m in model.named_modules() if family.is_norm(m)]:
        model.set_submodule(path, FusedNorm(norm, family, step))
    for index, theirs in enumerate(model.model.layers):
        theirs.self_attn = FusedAttention(theirs.self_attn, step, family)
        theirs.mlp = FusedMLP(theirs.mlp, step, gate)
        model.model.layers[index] = FusedLayer(theirs, step, family, index)
    return Decoder(model, family, step)


def _fits(model: Any, family: Family) -> bool:
    """Is it what the family's classes are: float32 on the CPU, with gate and angles known here?"""
    layers, config = model.model.layers, model.config
    floats = (p for p in model.parameters() if p.dim() == 1)
    return (
        gate_of(config) is not None
        and len(layers) == config.num_hidden_layers
        and all(family.is_layer(layer) for layer in layers)
        and all(p.is_cpu and p.dtype is torch.float32 for p in floats)
        and all(_turns_whole_heads(layer.self_attn) for layer in layers)
        and isinstance(model.lm_head, nn.Module)
    )


def _turns_whole_heads(attention: Any) -> bool:
    partial = (getattr(attention.config, "rope_parameters", None) or {}).get(
        "partial_rotary_factor", 1.0
    )
    return attention.head_dim % 2 == 0 and partial in (None, 1.0)
