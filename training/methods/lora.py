"""LoRA and rsLoRA: they differ in the scale alone."""

from __future__ import annotations

import math

from training.layers import LoraLinear
from training.methods.method import Method

LOW_RANK = {"lora_A.weight": "A", "lora_B.weight": "B"}

LORA = Method(
    name="lora",
    layer=LoraLinear,
    scale=lambda config: config.alpha / config.rank,
    tensors=LOW_RANK,
    peft_fields={},
)

RSLORA = (
    Method(  # "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732
        name="rslora",
        layer=LoraLinear,
        scale=lambda config: config.alpha / math.sqrt(config.rank),
        tensors=LOW_RANK,
        peft_fields={"use_rslora": True},
    )
)
