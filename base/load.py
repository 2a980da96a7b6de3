"""Any dense causal LM of transformers -> a base in NF4, on CPU or CUDA, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base import heap
from base.architecture import empty_model
from base.checkpoint import Checkpoint, read_json
from base.dense import RoundedLinear
from base.errors import UnservableBase
from base.filling import Filling
from base.fingerprint import default_cache_dir, fingerprint, fingerprints
from base.hub import Source, locate
from base.kept import KeptBase
from base.kept_tokenizer import TokenizerFile
from base.kernels import PanelWeight, Precision
from base.lean.outline import outline_of
from base.machine import choose_dtype, inspect
from base.nf4 import NF4Linear
from base.prequantized import refuse_foreign_quantization
from base.probe import AttentionShape, probe_attention
from base.scales import double_quant_of
from base.spec import BaseSpec, EmbeddingShape, LinearShape

__all__ = ["Base", "UnservableBase", "load_base", "load_float"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Base:
    """One frozen model: decoder linears in NF4, all else in `dtype`, everything on `device`.

    The three maps keep the modules as they were loaded: they still find the base's own layer
    after somebody has put a wrapper in its place in `model`.
    """

    model: Any  # transformers' PreTrainedModel or a LeanModel, in eval mode, without gradients
    tokenizer: Any  # transformers', a KeptTokenizer, or None where the directory has none
    spec: BaseSpec
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: frozenset[int]
    _linears: Mapping[str, NF4Linear | nn.Linear] = field(repr=False)
    _embeddings: Mapping[str, nn.Embedding] = field(repr=False)
    _norms: Mapping[str, nn.Module] = field(repr=False)

    @property
    def precision(self) -> Precision:
        """How its products over NF4 are computed: what was asked for, where it can be had."""
        layers = self._linears.values()
        fast = any(isinstance(layer.weight, PanelWeight) for layer in layers)
        return "fast" if fast else "exact"

    def linear(self, path: str) -> NF4Linear | nn.Linear:
        """The linear layer at a module path. Raises KeyError where the base has none."""
        return self._linears[path]

    def embedding(self, path: str) -> nn.Embedding:
        """The embedding at a module path. Raises KeyError where the base has none."""
        return self._embeddings[path]

    def norm(self, path: str) -> nn.Module:
        """The norm at a module path, with its `weight`. Raises KeyError where the base has none."""
        return self._norms[path]


def load_base(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    double_quant: bool | None = None,
    precision: Precision = "exact",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    keep: bool = True,
    always_probe: bool = False,
    lean: bool = False,
) -> Base:
    """Load a base from a directory or a hub id (`organisation/name`), and quantise it to NF4.

    Each decoder linear is quantised as its tensor is read, and the float copy is dropped at once:
    the peak is the NF4 base and about one tensor. Only safetensors are read, and no Python of the
    checkpoint runs. There is no network unless `source` is a hub id. `double_quant` quantises the
    scales too; None is as `base.scales` resolves it, which is yes for most. A checkpoint that is
    already in bitsandbytes' NF4 stays as it is. `precision` "fast" lays the weights out for
    products in 8 bits and keeps the output head in 8 bits (`base.dense`), for a CPU with the C
    library; anywhere else it changes nothing, and `Base.precision` says so.

    `cache_dir` (default: `default_cache_dir`) keeps the hashes of big weight files and, with `keep`
    and on a CPU, the base as it serves: the next load maps that file, and its tensors are the same
    bits. The trial run of `base.probe` is then left out where this code has passed it on this base,
    unless `always_probe`.

    `lean` is for serving: where the base is kept and its family known, its model comes without
    transformers and has no forward pass of its own (`base.lean`); `base.fused` runs it.
    Raises UnservableBase, with the reason.
    """
    found = locate(str(source), revision)
    config_json = read_json(found.directory / "config.json")
    if not config_json:
        raise UnservableBase(f"{found.directory} has no config.json")
    refuse_foreign_quantization(config_json)
    where = _device(device)
    compute = _dtype(dtype, where)
    checkpoint = Checkpoint(found.directory)
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    double = double_quant_of(found.directory, double_quant)
    digests = fingerprints(config_json, checkpoint.files, cache)
    on_cpu = where.type == "cpu"
    kept = KeptBase(cache, digests[double], compute, precision) if keep and on_cpu else None
    # Before the weights: as transformers reads it the first time it takes 100 MB for a moment.
    tokenizer = _tokenizer(found.directory, cache if kept is not None and lean else None)
    model = kept.lean() if kept is not None and lean and not always_probe else None
    if model is None:
        model = empty_model(config_json, compute)
        outline = None if kept is None else outline_of(model, config_json)
        if kept is None or not kept.fill(model):
            Filling(model, checkpoint, where, compute, double, precision).run()
            model.to(where)
            heap.trim()
            if kept is not None:
                kept.save(model, outline)
    attention = _probed(model, where, kept, always_probe)
    layers = _Layers.of(model)
    spec = _spec(found, digests[layers.double_quant], model, layers, attention)
    if config_json.get("quantization_config") is None:
        spec = replace(spec, twin=digests[not layers.double_quant])
    return Base(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        dtype=compute,
        device=where,
        eos_token_ids=_eos_token_ids(found.directory, model.config, tokenizer),
        _linears=layers.linears,
        _embeddings=layers.embeddings,
        _norms=layers.norms,
    )


def load_float(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
) -> Base:
    """The same base in floating point, nothing of it quantised: what a new base is trained from.

    Raises UnservableBase where `load_base` would, and for a checkpoint that is NF4 already.
    """
    found = locate(str(source), revision)
    config_json = read_json(found.directory / "config.json")
    if not config_json:
        raise UnservableBase(f"{found.directory} has no config.json")
    if config_json.get("quantization_config") is not None:
        raise UnservableBase(
            f"{found.directory} is quantised; its weights in floating point are needed"
        )
    where = _device(device)
    compute = _dtype(dtype, where)
    checkpoint = Checkpoint(found.directory)
    digest = fingerprint(
        config_json, checkpoint.files, double_quant=False, cache_dir=default_cache_dir()
    )
    model = empty_model(config_json, compute)
    Filling(model, checkpoint, where, compute, double_quant=False, quantize=False).run()
    model.to(where)
    tokenizer = _tokenizer(found.directory, None)
    layers = _Layers.of(model)
    return Base(
        model=model,
        tokenizer=tokenizer,
        spec=_spec(found, digest, model, layers, probe_attention(model, where)),
        dtype=compute,
        device=where,
        eos_token_ids=_eos_token_ids(found.directory, model.config, tokenizer),
        _linears=layers.linears,
        _embeddings=layers.embeddings,
        _norms=layers.norms,
    )


def _probed(
    model: Any, device: torch.device, kept: KeptBase | None, always: bool
) -> AttentionShape:
    """The shape of the model's attention, after a trial run that it passes now or has passed."""
    passed = None if kept is None or always else kept.passed()
    if passed is not None:
        return passed
    attention = probe_attention(model, device)
    if kept is not None:
        kept.note_passed(attention)
    return attention


@dataclass(frozen=True, slots=True)
class _Layers:
    """The modules of a loaded model that adapters can name, by path."""

    linears: dict[str, NF4Linear | nn.Linear]
    embeddings: dict[str, nn.Embedding]
    norms: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> _Layers:
        modules = dict(model.named_modules())
        return cls(
            linears={p: m for p, m in modules.items() if isinstance(m, NF4Linear | nn.Linear)},
            embeddings={p: m for p, m in modules.items() if isinstance(m, nn.Embedding)},
            norms={p: m for p, m in modules.items() if _is_norm(m)},
        )

    @property
    def double_quant(self) -> bool:
        return any(m.weight.is_nested for m in self.linears.values() if isinstance(m, NF4Linear))


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1


def _spec(
    found: Source, digest: str, model: Any, layers: _Layers, attention: AttentionShape
) -> BaseSpec:
    config = model.config
    embedding = model.get_input_embeddings()
    return BaseSpec(
        id=found.id,
        revision=found.revision,
        architecture=config.model_type,
        fingerprint=digest,
        linears={path: _linear_shape(layer) for path, layer in layers.linears.items()},
        embeddings={
            path: EmbeddingShape(*table.weight.shape) for path, table in layers.embeddings.items()
        },
        norms={
            path: int(norm.get_parameter("weight").numel()) for path, norm in layers.norms.items()
        },
        tied_embeddings=model.get_output_embeddings().weight is embedding.weight,
        num_layers=attention.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=int(embedding.weight.shape[0]),
        max_positions=config.max_position_embeddings,
        double_quant=layers.double_quant,
    )


def _linear_shape(layer: NF4Linear | nn.Linear) -> LinearShape:
    return LinearShape(
        out_features=layer.out_features,
        in_features=layer.in_features,
        bias=layer.bias is not None,
        quantized=isinstance(layer, NF4Linear) and not isinstance(layer, RoundedLinear),
    )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(device)
    there = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= there:
        raise UnservableBase(
            f"device {device}: torch {torch.__version__} sees {there} CUDA devices here; take cpu, "
            "or auto, or install PyTorch's CUDA build"
        )
    return found


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = choose_dtype(inspect(), device.type)[0]
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}; got {dtype}")
    return chosen


def _tokenizer(directory: Path, cache: Path | None) -> Any:
    """transformers' own; with a `cache` the one that is kept there, first made where it must be."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    file = None if cache is None else TokenizerFile(cache, directory)
    if file is not None and (kept := file.read()) is not None:
        return kept
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise UnservableBase(f"the tokenizer cannot be loaded: {error}") from error
    if file is None:
        return tokenizer
    file.save(tokenizer)
    # What transformers made has every word twice, once as an object of Python.
    return file.read() or tokenizer


def _eos_token_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: chat models often have more than the tokenizer's one."""
    named = [
        read_json(directory / "generation_config.json").get("eos_token_id"),
        config.eos_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ]
    ids = [i for one in named for i in (one if isinstance(one, list) else [one])]
    return frozenset(i for i in ids if i is not None)
