"""Are the scales of a base's NF4 quantised once more? One answer for all who load it."""

from __future__ import annotations

from pathlib import Path

from base import mini
from base.checkpoint import read_json


def double_quant_of(directory: Path, asked: bool | None = None) -> bool:
    """Double quantisation or plain scales, for the base in `directory`.

    A checkpoint that is NF4 already stays as it is, whatever is asked. Else what is asked for, else
    what the base says of itself, as the embedded one does, else double quantisation, as QLoRA has
    it. Serving and training both ask here: another answer is another base.
    """
    stored = read_json(directory / "config.json").get("quantization_config")
    if stored is not None:
        return bool(stored.get("bnb_4bit_use_double_quant", False))
    if asked is not None:
        return asked
    return mini.DOUBLE_QUANT if directory.resolve() == mini.MINI.resolve() else True
