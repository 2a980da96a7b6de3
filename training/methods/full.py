"""Full fine-tuning: every weight of a float base trains, and what is saved is a base again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from base.errors import UnservableBase
from base.hub import locate
from base.load import Base
from base.mini import MINI
from base.nf4 import NF4Linear
from training.config import FullTuning, TrainConfig
from training.distributed import leads, part_of, whole
from training.errors import MethodError
from training.methods.attached_model import AttachedModel
from training.methods.method import Method
from training.tree import replacing

WEIGHTS = "model.safetensors"
TEMPLATE = "chat_template.jinja"
# What a base has beside config and weights, and training does not change.
TAKEN_ALONG = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    TEMPLATE,
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FullWeights(AttachedModel):
    """The base's own weights as what trains. `detach` freezes them; it does not undo the training,
    for that would need a second copy: load the base again."""

    def __init__(self, base: Base, source: Path, config: FullTuning, out: Path) -> None:
        if any(isinstance(module, NF4Linear) for module in base.model.modules()):
            raise MethodError(
                f"method full trains weights in floating point, and {base.spec.id} is loaded in "
                "NF4: base.load.load_float loads it as it is needed"
            )
        if out.resolve() == source.resolve():
            raise MethodError(f"out is {out}, the base itself: name another directory")
        self.base, self.source, self.config = base, source, config
        kept = () if config.embeddings else _tables(base.model)
        for parameter in base.model.parameters():
            parameter.requires_grad_(not any(parameter is table for table in kept))

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.base.model.parameters() if p.requires_grad]

    def state(self) -> dict[str, Any]:
        return {"parameters": [whole(p.detach()).clone() for p in self.parameters()]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for parameter, kept in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(part_of(kept, parameter))

    def save(self, out: Path) -> None:
        """Write config, weights and the base's tokenizer, as transformers reads them.

        A chat template that lies in `out` already stays: it is the run's own. Of several processes
        all have to ask, for each may have a part of the weights; the first one writes.
        """
        tensors = self._tensors()
        if not leads():
            return
        out.mkdir(parents=True, exist_ok=True)
        for name in TAKEN_ALONG:
            given = self.source / name
            if given.is_file() and not (name == TEMPLATE and (out / name).exists()):
                shutil.copyfile(given, out / name)
        fields = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        fields.pop("torch_dtype", None)
        fields["dtype"] = self.config.store
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
        with replacing(out / WEIGHTS) as written:
            save_file(tensors, written, metadata={"format": "pt"})
            written.chmod(0o644)

    def _tensors(self) -> dict[str, Tensor]:
        """By name, in the dtype that is stored; what is tied is stored once."""
        dtype, seen, found = _DTYPES[self.config.store], set[int](), {}
        for name, tensor in self.base.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                stored = dtype if tensor.is_floating_point() else tensor.dtype
                full = whole(tensor.detach())
                if leads():
                    found[name] = full.to("cpu", stored).contiguous()
        return found

    def detach(self) -> None:
        self.base.model.requires_grad_(False)


def _tables(model: Any) -> tuple[nn.Parameter, ...]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(p for end in ends if end is not None for p in end.parameters())


def _attach(base: Base, config: TrainConfig) -> FullWeights:
    assert isinstance(config.method, FullTuning)
    try:
        source = MINI if config.base == "mini" else locate(config.base, None).directory
    except UnservableBase as error:
        raise MethodError(f"base {config.base}: {error}") from None
    return FullWeights(base, source, config.method, config.out)


FULL = Method("full", _attach, makes_base=True)
