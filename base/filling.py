"""From a checkpoint's tensors to the places they have in an empty model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from base import heap
from base.checkpoint import Checkpoint
from base.dense import keeps_dtype, round_head, swap_stored
from base.errors import UnservableBase
from base.kernels import NF4Weight, PanelWeight, Precision, with_precision
from base.nf4 import NF4Linear
from base.prequantized import PrequantizedParts

_TRIM_WEIGHTS = 1 << 26  # weights that are read between two trims: 256 MiB of them in float32
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Filling:
    """Puts each tensor of a checkpoint in its place in an empty model, or says why it cannot."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        double_quant: bool,
        precision: Precision = "exact",
        quantize: bool = True,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.double_quant = double_quant
        self.precision = precision
        self.quantize = quantize  # False: every tensor in `dtype`, as a model that is to be trained
        self.parts = PrequantizedParts(checkpoint)
        self.expected: dict[str, Tensor] = dict(model.state_dict())  # on the meta device
        self.filled: set[str] = set()
        # Views of the mapped checkpoint that nobody has read yet: parameter and key, by its id.
        self.unread: dict[int, tuple[nn.Parameter, str]] = {}
        conversions = get_model_conversion_mapping(model)
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.renamings = [c for c in conversions if not isinstance(c, WeightConverter)]

    def run(self) -> None:
        since_trim = 0
        for key, name in self._names():
            since_trim += self.expected[name].numel()
            if since_trim > _TRIM_WEIGHTS:
                heap.trim()
                since_trim = 0
            if key in self.parts.weights:
                self._place_prequantized(name, self.parts.read(key))
            else:
                self._place(name, key)
            self.filled.add(name)
        missing = set(self.expected) - self.filled
        # Ties what the config ties, symmetrically, and takes the tied ones off `missing`.
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if missing:
            raise UnservableBase(f"the checkpoint lacks {_some(missing)}")
        if self.dtype is torch.float32 and self.quantize:
            swap_stored(self.model)
        if self.dtype is torch.float32 and self.precision == "fast":
            round_head(self.model, self._quantize8)
        self._copy_unread()

    def _names(self) -> Iterator[tuple[str, str]]:
        """(key in the checkpoint, name in the model) of every tensor that is to be placed."""
        names = {key: self._rename(key) for key in self.checkpoint if key not in self.parts.extras}
        ignored = _ignored(self.model)
        unknown = {
            key
            for key, name in names.items()
            if name not in self.expected and not ignored.search(name)
        }
        if unknown:
            raise UnservableBase(
                f"{type(self.model).__name__} has no place for {_some(unknown)} of the checkpoint"
            )
        placed: dict[str, str] = {}
        for key, name in names.items():
            if name in placed:
                raise UnservableBase(f"{placed[name]} and {key} are both {name} of the model")
            placed[name] = key
        return ((key, name) for name, key in placed.items() if name in self.expected)

    def _rename(self, key: str) -> str:
        """The model's name for a key, by transformers' own table of older and other layouts."""
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(
            key, self.renamings, self.converters, self.model.base_model_prefix, self.expected
        )
        if converted is not None:
            raise UnservableBase(
                f"{key} must be converted to {name} ({converted}): load the checkpoint with "
                "transformers, save it again, and serve the copy"
            )
        return cast(str, name)

    def _place(self, name: str, key: str) -> None:
        tensor = self.checkpoint.read(key)
        if tensor.shape != self.expected[name].shape:
            raise UnservableBase(
                f"{name} is {list(tensor.shape)} in the checkpoint, "
                f"config.json asks for {list(self.expected[name].shape)}"
            )
        parent_path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        if leaf in parent._buffers:
            parent._buffers[leaf] = tensor.to(self.device, self.expected[name].dtype, copy=True)
        elif tensor.dtype not in _FLOATS:
            raise UnservableBase(f"{name} is {tensor.dtype}; weights are float32 or 16 bit floats")
        elif leaf == "weight" and self._is_quantised(parent):
            # GPT-2's Conv1D is a linear layer that keeps its weight as [in, out].
            rows = tensor if isinstance(parent, nn.Linear) else tensor.T
            weight = NF4Weight.quantize(rows.to(self.device), self.double_quant)
            self._swap(parent_path, parent, weight)
        else:
            self._place_float(parent, leaf, tensor, key)

    def _place_float(self, parent: nn.Module, leaf: str, tensor: Tensor, key: str) -> None:
        """A copy, or the parameter would keep the whole mapped file in memory. The table and the
        head stay views until it is known whether they are kept in 8 bits."""
        dtype = self._kept_dtype(parent, tensor)
        if leaf == "weight" and tensor.dtype is dtype and self._may_be_rounded(parent):
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.unread[id(parameter)] = (parameter, key)
        else:
            copy = tensor.to(self.device, dtype, copy=True)
            parameter = nn.Parameter(copy, requires_grad=False)
        setattr(parent, leaf, parameter)

    def _may_be_rounded(self, module: nn.Module) -> bool:
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return (
            self.precision == "fast"
            and self.quantize
            and self.device.type == "cpu"
            and any(module is end for end in ends)
        )

    def _quantize8(self, weight: Tensor) -> PanelWeight:
        """Of a view, by stretches of rows: neither the whole matrix nor its file is in memory."""
        found = self.unread.get(id(weight))
        if found is None:
            return PanelWeight.quantize8(weight)
        rows, width = weight.shape
        key = found[1]
        return PanelWeight.quantize8_rows(
            (rows, width), lambda start, stop: self.checkpoint.read_rows(key, start, stop)
        )

    def _copy_unread(self) -> None:
        """Those that stayed as they were."""
        placed = {id(parameter) for parameter in self.model.parameters()}
        for number, (parameter, _) in self.unread.items():
            if number in placed:
                parameter.data = parameter.data.clone()
        self.unread.clear()

    def _place_prequantized(self, name: str, weight: NF4Weight) -> None:
        path = name.removesuffix(".weight")
        layer = self.model.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            raise UnservableBase(f"{name} is quantised but {path} is a {type(layer).__name__}")
        if weight.shape != self.expected[name].shape:
            raise UnservableBase(
                f"{name} is {list(weight.shape)} in the checkpoint, "
                f"config.json asks for {list(self.expected[name].shape)}"
            )
        self._swap(path, layer, weight.to(self.device))

    def _kept_dtype(self, module: nn.Module, tensor: Tensor) -> torch.dtype:
        """The model's dtype; for the table and the head on a CPU their own, if it is bfloat16."""
        small = tensor.dtype is torch.bfloat16 and self.dtype is torch.float32
        if (
            small
            and self.quantize
            and self.device.type == "cpu"
            and keeps_dtype(self.model, module)
        ):
            return torch.bfloat16
        return self.dtype

    def _is_quantised(self, module: nn.Module) -> bool:
        """Is this a decoder linear? What a quantised checkpoint left in float stays in float."""
        from transformers.pytorch_utils import Conv1D

        return (
            self.quantize
            and isinstance(module, nn.Linear | Conv1D)
            and module is not self.model.get_output_embeddings()
            and not self.parts.weights
        )

    def _swap(self, path: str, layer: nn.Module, weight: NF4Weight) -> None:
        """The bias goes along: filled already, or on the meta device until its turn comes."""
        laid_out = with_precision(weight, self.precision)
        self.model.set_submodule(path, NF4Linear(laid_out, layer._parameters["bias"]))


def _ignored(model: Any) -> re.Pattern[str]:
    """Keys that transformers knows to be of no use: buffers that older versions saved."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return re.compile("|".join(f"(?:{p})" for p in patterns))


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
