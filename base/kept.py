"""A base as it serves, kept on disk: the next start maps it, and quantises nothing.

One file for each base, dtype and layout in `bases/` of the cache directory, and beside it a note of
the trial run that this base passed. Whatever is wrong with either costs time and never an answer:
it is logged, and the base is made from its checkpoint again. Only for the CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.checkpoint import read_json
from base.dense import RoundedEmbedding, place_rounded, swap_stored
from base.errors import UnservableBase
from base.fused import can_fuse
from base.kernels import NF4Weight, PanelWeight, Precision, Weight, native_status, panels_serve
from base.lean.model import LeanModel, Outline
from base.mapped_file import DamagedFile, Mapped, read, write
from base.nf4 import NF4Linear
from base.probe import AttentionShape

FORMAT = 3  # of the file: its names, notes and layouts
_FOLDER = "bases"
_COMPUTING = ("*.py", "kernels/*.py", "lean/*.py")  # of this package
_KEPT_FREE = 1 << 30  # bytes that stay free on the disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptBase:
    """Where one base is kept, in one dtype and one layout of its weights."""

    cache_dir: Path
    source: str  # the fingerprint of checkpoint and quantisation that were asked for
    dtype: torch.dtype
    precision: Precision

    @cached_property
    def file(self) -> Path:
        dtype = str(self.dtype).removeprefix("torch.")
        return kept_folder(self.cache_dir) / f"{self.source}-{dtype}-{self._layout}.safetensors"

    @property
    def _layout(self) -> str:
        return "panels" if self.precision == "fast" and panels_serve() else "nf4"

    @property
    def _key(self) -> str:
        """All that the file's tensors depend on: names are transformers', layouts are ours."""
        key = {
            "format": FORMAT,
            "source": self.source,
            "dtype": str(self.dtype),
            "layout": self._layout,
            "transformers": metadata.version("transformers"),
        }
        return json.dumps(key, sort_keys=True)

    def fill(self, model: Any) -> bool:
        """Fill an empty model from the file; False, and the model untouched, without a good one."""
        try:
            mapped = read(self.file)
            if mapped.notes.get("key") != self._key:
                raise DamagedFile("it was made for another base, or by another version")
            parts = _Parts.of(mapped)
            parts.check(model)
        except FileNotFoundError:
            return False
        except (OSError, DamagedFile) as error:
            log.warning("the kept base %s is not used and made anew: %s", self.file, error)
            return False
        parts.place(model)
        if self.dtype is torch.float32:
            swap_stored(model)
        return True

    def lean(self) -> LeanModel | None:
        """The base without transformers, filled; None where that cannot be: it is not kept, its
        family is not known, or this code has not passed the trial run on it yet."""
        if self.dtype is not torch.float32 or self.passed() is None:
            return None
        try:
            mapped = read(self.file)
            outline = json.loads(mapped.notes["outline"])
            if mapped.notes.get("key") != self._key or outline is None:
                return None
            model = LeanModel(outline)
            parts = _Parts.of(mapped)
            parts.check(model)
        except (OSError, DamagedFile, KeyError, ValueError, TypeError, AttributeError):
            return None  # `fill` says in the log what is wrong with the file
        parts.place(model)
        swap_stored(model)
        return model if can_fuse(model) else None

    def save(self, model: Any, outline: Outline | None = None) -> None:
        """Keep what was loaded, and the outline of `lean`; a line in the log where that is not
        possible."""
        try:
            tensors, notes = _taken(model)
            notes["outline"] = json.dumps(outline)
            size = sum(tensor.nbytes for tensor in tensors.values())
            self.file.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.file.parent).free
            if free < size + _KEPT_FREE:
                raise OSError(f"{size >> 20} MiB are wanted, {free >> 20} MiB are free")
            write(self.file, tensors, {**notes, "key": self._key})
        except (OSError, ValueError) as error:
            log.warning("the base is not kept for the next start in %s: %s", self.file, error)

    def passed(self) -> AttentionShape | None:
        """What the trial run found, if this very code passed it on this base."""
        with suppress(OSError, UnservableBase, TypeError):
            note = read_json(self._note)
            if note.get("key") == self._key and note.get("code") == code_version():
                shape = AttentionShape(**note["attention"])
                if all(type(value) is int for value in asdict(shape).values()):
                    return shape
        return None

    def note_passed(self, attention: AttentionShape) -> None:
        """Remember that the trial run passed; without a kept base there is nothing to remember."""
        if not self.file.exists():
            return
        note = {"key": self._key, "code": code_version(), "attention": asdict(attention)}
        with suppress(OSError):
            handle, name = tempfile.mkstemp(suffix=".tmp", dir=self._note.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(note, file, indent=1)
            os.replace(name, self._note)

    @property
    def _note(self) -> Path:
        return self.file.with_suffix(".json")


def kept_folder(cache_dir: Path) -> Path:
    """Where bases are kept. It may be removed at any time: the next start is slower."""
    return cache_dir / _FOLDER


def kept_bytes(cache_dir: Path) -> int:
    """The size of all bases that are kept."""
    return sum(file.stat().st_size for file in kept_folder(cache_dir).glob("*.safetensors"))


def code_version() -> str:
    """A digest of what computes logits here: torch, transformers, our base package, its library."""
    digest = hashlib.sha256()
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    cpu = (torch.backends.cpu.get_cpu_capability(), native_status(), platform.python_version())
    digest.update(json.dumps([packages, cpu], sort_keys=True).encode())
    folder = Path(__file__).parent
    code = (p for pattern in _COMPUTING for p in folder.glob(pattern))
    for file in sorted([*code, *_library(folder)]):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _library(folder: Path) -> Iterator[Path]:
    return (folder / "kernels").glob("_native.so")


@dataclass(frozen=True)
class _Parts:
    """What a file holds, in terms of a model."""

    tensors: Mapping[str, Tensor]  # parameters and buffers by name
    weights: Mapping[str, Weight]  # NF4 layers, and what is kept in 8 bits, by path
    tied: frozenset[str]  # names that share a tensor with one of `tensors`

    @classmethod
    def of(cls, mapped: Mapped) -> _Parts:
        try:
            layers = json.loads(mapped.notes["layers"])
            tied = frozenset(json.loads(mapped.notes["tied"]))
            weights = _weights(layers, mapped.tensors)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DamagedFile(f"it does not hold a whole base: {error!r}") from error
        tensors = {name: t for name, t in mapped.tensors.items() if ":" not in name}
        return cls(tensors, weights, tied)

    def check(self, model: Any) -> None:
        """Is every place of the empty model filled by a tensor of its shape, and no other?"""
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        quantised = {f"{path}.weight": weight.shape for path, weight in self.weights.items()}
        found = {name: tuple(t.shape) for name, t in self.tensors.items()} | quantised
        if found.keys() | self.tied != expected.keys() or found.keys() & self.tied:
            raise DamagedFile("its tensors are not those of the model")
        for name, shape in found.items():
            # A transposed layer (Conv1D) keeps its weight as [in, out].
            if shape != expected[name] and (
                name not in quantised or tuple(shape)[::-1] != expected[name]
            ):
                raise DamagedFile(f"{name} is {shape}, the model has {expected[name]}")

    def place(self, model: Any) -> None:
        for path, weight in self.weights.items():
            module = model.get_submodule(path)
            if isinstance(weight, PanelWeight) and weight.bits == 8:
                place_rounded(model, module, weight)
            else:
                model.set_submodule(path, NF4Linear(weight, module._parameters["bias"]))
        for name, tensor in self.tensors.items():
            parent_path, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_path)
            if leaf in parent._buffers:
                parent._buffers[leaf] = tensor
            else:
                setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
        missing = set(self.tied)
        if missing:
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
        assert not missing, f"not tied in the model: {missing}"


def _taken(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, each once; notes) of a filled model."""
    tensors: dict[str, Tensor] = {}
    tied: list[str] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            tied.append(name)
            continue
        seen.add(place)
        tensors[name] = tensor
    layers: dict[str, Any] = {}
    first: dict[int, str] = {}  # path of a weight that two modules read
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear | RoundedEmbedding):
            weight: Weight = module.weight
            if first.setdefault(id(weight), path) != path:
                layers[path] = {"same": first[id(weight)]}
                continue
            layers[path] = _described(weight)
            for name, tensor in weight.tensors().items():
                tensors[f"{path}.weight:{name}"] = tensor
    return tensors, {"layers": json.dumps(layers), "tied": json.dumps(tied)}


def _described(weight: Weight) -> dict[str, Any]:
    row = {"shape": list(weight.shape), "parts": sorted(weight.tensors())}
    if isinstance(weight, PanelWeight):
        return {**row, "bits": weight.bits, "is_nested": weight.is_nested}
    return {**row, "blocksize": weight.blocksize}


def _weights(
    layers: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, Weight]:
    """What `_described` said of each layer; two that read the same weight read it again."""
    own = {path: _weight(path, row, tensors) for path, row in layers.items() if "same" not in row}
    return {path: own[row.get("same", path)] for path, row in layers.items()}


def _weight(path: str, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    parts: dict[str, Any] = {name: tensors[f"{path}.weight:{name}"] for name in row["parts"]}
    out, width = row["shape"]
    if "bits" in row:
        return PanelWeight(
            **parts, shape=(out, width), bits=row["bits"], is_nested=row["is_nested"]
        )
    return NF4Weight(**parts, shape=(out, width), blocksize=row["blocksize"])
