"""DoRA: LoRA for the direction, a trained magnitude for each output row."""

from __future__ import annotations

from training.layers import DoraLinear
from training.methods.lora import LORA, LOW_RANK
from training.methods.method import Method

DORA = Method(
    name="dora",
    layer=DoraLinear,
    scale=LORA.scale,
    tensors={**LOW_RANK, "lora_magnitude_vector": "m"},
    peft_fields={"use_dora": True},
)
