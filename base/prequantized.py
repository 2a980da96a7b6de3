"""Checkpoints that are in bitsandbytes' NF4 already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from base.checkpoint import Checkpoint
from base.errors import UnservableBase
from base.kernels import NF4Weight

_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NESTED_BLOCKSIZE = 256


def refuse_foreign_quantization(config_json: Mapping[str, Any]) -> None:
    """Float checkpoints and bitsandbytes' NF4 pass; any other quantisation raises."""
    quantization = config_json.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "an unnamed method")
    if method == "bitsandbytes" and not quantization.get("load_in_4bit"):
        method = "bitsandbytes in 8 bit"
    elif method == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") != "nf4":
        method = f"bitsandbytes in {quantization.get('bnb_4bit_quant_type', 'fp4')}"
    if method != "bitsandbytes":
        raise UnservableBase(
            f"the checkpoint is quantised by {method}; float weights and bitsandbytes' NF4 load"
        )


class PrequantizedParts:
    """Which weights of a checkpoint are NF4 already, and the keys that belong to each.

    bitsandbytes writes, for a weight `w`: `w` itself (the packed codes), `w.absmax`,
    `w.quant_map`, with double quantisation `w.nested_absmax` and `w.nested_quant_map`, and
    `w.quant_state.bitsandbytes__nf4`, a JSON object as bytes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.weights: set[str] = set()
        self.extras: set[str] = set()
        for state in (key for key in checkpoint if _STATE in key):
            weight, _, kind = state.partition(_STATE)
            if kind != "nf4":
                raise UnservableBase(f"{weight} is quantised as {kind}; nf4 is served")
            self.weights.add(weight)
            self.extras.add(state)
            self.extras.update(weight + part for part in _PARTS if weight + part in checkpoint)

    def read(self, key: str) -> NF4Weight:
        """One weight on the CPU, copied from the mapped file."""
        try:
            return self._read(key)
        except (KeyError, ValueError, TypeError) as error:
            raise UnservableBase(
                f"{key} is no whole NF4 weight of bitsandbytes: {error}"
            ) from error

    def _read(self, key: str) -> NF4Weight:
        state = self._state(key)
        self._check_levels(key)
        nested: dict[str, Tensor] = {}
        if key + ".nested_absmax" in self._checkpoint:
            if state["nested_blocksize"] != _NESTED_BLOCKSIZE:
                raise ValueError(f"nested blocks of {state['nested_blocksize']}, 256 load")
            nested = {
                "nested_absmax": self._part(key, ".nested_absmax"),
                "nested_code": self._part(key, ".nested_quant_map"),
                "nested_offset": torch.tensor(float(state["nested_offset"])),
            }
        out, width = state["shape"]
        return NF4Weight(
            packed=self._checkpoint.read(key).reshape(-1).view(torch.uint8).clone(),
            absmax=self._part(key, ".absmax"),
            shape=(out, width),
            blocksize=state["blocksize"],
            **nested,
        )

    def _state(self, key: str) -> dict[str, Any]:
        raw = self._checkpoint.read(f"{key}{_STATE}nf4")
        state: dict[str, Any] = json.loads(bytes(raw.tolist()))
        return state

    def _part(self, key: str, part: str) -> Tensor:
        tensor = self._checkpoint.read(key + part)
        return (tensor if tensor.dtype == torch.uint8 else tensor.float()).clone()

    def _check_levels(self, key: str) -> None:
        """NF4's sixteen levels are a constant of ours; a checkpoint with others would be wrong."""
        levels = self._part(key, ".quant_map")
        if levels.shape != (16,) or not torch.allclose(levels, nf4_levels(), atol=1e-6):
            raise ValueError(f"{key}.quant_map does not hold the sixteen levels of NF4")


def nf4_levels() -> Tensor:
    """The levels in ascending order, float32 [16], as the kernels decode them."""
    codes = torch.tensor([16 * i + i + 1 for i in range(0, 16, 2)], dtype=torch.uint8)
    return NF4Weight(codes, torch.ones(1), (1, 16)).dequantize().reshape(-1)
