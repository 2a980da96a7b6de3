"""A new LoRA made of stored ones, as PEFT's `add_weighted_adapter` makes it: files to a file.

Layer by layer: at no time more than one layer's factors are in memory (for the `_svd` methods its
whole deltas), and the new file is written as they come. The scales of the parts are folded into
the new factors, so the new adapter has alpha = r everywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.compose import Part
from adapters.compose_methods import (
    WAYS,
    MajoritySign,
    Recipe,
    combine,
    truncated,
    truncated_product,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.lowering.checkpoint import AdapterCheckpoint
from adapters.promises import PREFIX
from base.spec import BaseSpec

CONCATENATE, SVD = "concatenate", "svd"
FULL = {f"{way}_svd": way for way in WAYS if way != "linear"}  # over whole deltas, not factors
METHODS = (CONCATENATE, SVD, *WAYS, *FULL)
PRUNING = tuple(name for name in METHODS if name.removesuffix("_svd") in WAYS and name != "linear")
RANDOM = tuple(name for name in METHODS if name.startswith("dare"))
MAX_DELTA_BYTES = 2 << 30  # of one layer's whole deltas


@dataclass(frozen=True, slots=True)
class Composition:
    """How to make one adapter of several."""

    method: str  # one of METHODS
    density: float = 1.0  # share of the numbers that pruning leaves
    rank: int | None = None  # of the svd methods; the largest of the parts when unset
    seed: int = 0  # of random pruning
    majority_sign: MajoritySign = "total"

    @property
    def reduces(self) -> bool:
        return self.method == SVD or self.method in FULL


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of the new adapter."""

    path: str
    parts: tuple[int, ...]  # which parts touch it
    out: int
    inner: int
    rank: int
    embedding: bool

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B in the file, below PEFT's prefix."""
        if self.embedding:
            return f"{self.path}.lora_embedding_A", f"{self.path}.lora_embedding_B"
        return f"{self.path}.lora_A.weight", f"{self.path}.lora_B.weight"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rank, self.inner), (self.out, self.rank)

    @property
    def nbytes(self) -> int:
        return 4 * self.rank * (self.inner + self.out)


def compose_stored(
    parts: Sequence[tuple[Part, Path]],
    how: Composition,
    spec: BaseSpec,
    limits: Limits,
    directory: Path,
) -> tuple[bytes, Path]:
    """Write the new adapter into `directory`: its config, and the path of its weights.

    parts   in the order in which PEFT would be given them, with their weights files

    Raises InvalidAdapter where the parts do not compose so, with the numbers and what would.
    """
    layers = plan([part for part, _ in parts], how, spec, limits)
    weights = directory / "adapter_model.safetensors"
    recipe = Recipe(how.density, how.majority_sign, torch.Generator().manual_seed(how.seed))
    with ExitStack() as stack, weights.open("wb") as file, torch.no_grad():
        files = [
            stack.enter_context(AdapterCheckpoint(path, torch.device("cpu"))) for _, path in parts
        ]
        file.write(_header(layers))
        for layer in layers:
            whole = how.method in FULL
            factors = [_factors(files[n], parts[n][0], layer, whole) for n in layer.parts]
            for tensor in _finite(layer, factors, how, recipe):
                file.write(tensor.contiguous().numpy().tobytes())
    return json.dumps(_config(layers)).encode(), weights


def plan(
    parts: Sequence[Part], how: Composition, spec: BaseSpec, limits: Limits
) -> tuple[Layer, ...]:
    """The layers of the new adapter, in the model's order. Raises InvalidAdapter."""
    for part in parts:
        _check_part(part)
    ranks = [dict(_ranks(part.manifest.config)) for part in parts]
    largest = max(max(own.values()) for own in ranks)
    layers = []
    for path in (*spec.embeddings, *spec.linears):
        here = tuple(n for n, own in enumerate(ranks) if path in own)
        if here:
            found = [ranks[n][path] for n in here]
            layers.append(_layer(path, here, found, how.rank or largest, how, spec))
    for layer in layers:
        if layer.rank > limits.max_rank:
            raise InvalidAdapter(
                f"{layer.path} would have rank {layer.rank}, limit {limits.max_rank}: take fewer "
                'parts, or "method": "svd" with a lower rank',
                "rank",
            )
    total = sum(layer.nbytes for layer in layers)
    if total > limits.max_weights_bytes:
        raise InvalidAdapter(
            f"the new adapter would take {total} bytes, limit {limits.max_weights_bytes}: take "
            'fewer parts, or "method": "svd" with a lower rank',
            "parts",
        )
    return tuple(layers)


def _layer(
    path: str,
    here: tuple[int, ...],
    ranks: list[int],
    wanted: int,
    how: Composition,
    spec: BaseSpec,
) -> Layer:
    embedding = path in spec.embeddings
    if embedding:
        out, inner = spec.embeddings[path].width, spec.embeddings[path].rows
    else:
        out, inner = spec.linears[path].out_features, spec.linears[path].in_features
    if how.method == CONCATENATE:
        rank = sum(ranks)
    elif how.reduces:
        bound = sum(ranks) if how.method == SVD else max(out, inner)
        rank = min(wanted, out, inner, bound)
    else:
        rank = ranks[0]
        if len(set(ranks)) > 1:
            raise InvalidAdapter(
                f"{how.method} adds factors of one rank, and {path} has ranks "
                f"{', '.join(map(str, ranks))}; take concatenate or svd, which take any",
                "method",
            )
    needed = 4 * out * inner * (len(here) + 3)
    if how.method in FULL and needed > MAX_DELTA_BYTES:
        raise InvalidAdapter(
            f"{how.method} needs the whole deltas of {path}, {needed} bytes, limit "
            f"{MAX_DELTA_BYTES}; take svd or {FULL[how.method]}, which do not",
            "method",
        )
    return Layer(path, here, out, inner, rank, embedding)


def _check_part(part: Part) -> None:
    """Only factors compose so: PEFT's `add_weighted_adapter` leaves all else of a LoRA behind."""
    manifest, config = part.manifest, part.manifest.config
    reason = ""
    if manifest.kind not in ("lora", "rslora"):
        reason = (
            f"a {manifest.kind} is no plain LoRA; low-rank kinds can be added in a request: "
            '"adapter_id": "a:0.7,b:0.3"'
        )
        if config.get("use_dora"):
            reason = "DoRA's magnitudes belong to its own W + BA; train with use_dora=false"
    for field, plain in (("modules_to_save", None), ("lora_bias", False), ("bias", "none")):
        if not reason and config.get(field, plain) not in (plain, [], ()):
            reason = f"{field} is {config[field]!r}, and only factors compose; train without it"
    if not reason and config.get("trainable_token_indices"):
        reason = "trainable_token_indices replaces rows of a table; train without it"
    if not reason and (manifest.vocabulary or manifest.tokenizer_sha256):
        reason = "it has a vocabulary of its own; only adapters that read and write the base's do"
    if reason:
        raise InvalidAdapter(f"{manifest.name}@{manifest.version}: {reason}", "parts")


def _ranks(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for path in config["target_modules"]:
        yield path, int(config["rank_pattern"].get(path, config["r"]))


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = float(config["alpha_pattern"].get(path, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _factors(
    file: AdapterCheckpoint, part: Part, layer: Layer, whole: bool
) -> tuple[Tensor, Tensor, float]:
    """A, B and the weight of one part, the scale in the weight. For whole deltas it is in B: PEFT
    scales them before it prunes, where it changes whose sign has the majority."""
    config = part.manifest.config
    rank = dict(_ranks(config))[layer.path]
    name_A, name_B = layer.names
    A, B = file.take(name_A, rank, layer.inner), file.take(name_B, layer.out, rank)
    scale = _scale(config, layer.path, rank)
    return (A, B * scale, part.weight) if whole else (A, B, part.weight * scale)


def _finite(
    layer: Layer,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    how: Composition,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """`_combined`, or InvalidAdapter where its numbers are no longer any: a density of nearly
    nothing divides by it."""
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # svd of what is not finite
        A, B = _combined(layer, factors, how, recipe)
        if bool(A.isfinite().all()) and bool(B.isfinite().all()):
            return A, B
    raise InvalidAdapter(
        f"{layer.path}: {how.method} makes numbers that are not finite of these parts; take a "
        "density nearer to 1, or smaller weights",
        "parts",
    )


def _combined(
    layer: Layer,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    how: Composition,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the new adapter."""
    if how.method in (CONCATENATE, SVD):
        A = torch.cat([a for a, _, _ in factors])
        B = torch.cat([b * weight for _, b, weight in factors], dim=1)
        return (A, B) if how.method == CONCATENATE else truncated_product(A, B, layer.rank)
    if how.method in FULL:
        # In PEFT's layout, which is transposed for embeddings: the masks are drawn in it.
        deltas = [(b @ a).t().contiguous() if layer.embedding else b @ a for a, b, _ in factors]
        found = combine(FULL[how.method], deltas, [weight for _, _, weight in factors], recipe)
        return truncated(found.t() if layer.embedding else found, layer.rank)
    # Half of each weight on either factor; a negative one keeps its sign on A alone.
    roots = [math.sqrt(abs(weight)) for _, _, weight in factors]
    signed = [math.copysign(root, w) for root, (_, _, w) in zip(roots, factors, strict=True)]
    A = combine(how.method, [a for a, _, _ in factors], signed, recipe)
    return A, combine(how.method, [b for _, b, _ in factors], roots, recipe)


def _header(layers: Sequence[Layer]) -> bytes:
    """Of a safetensors file of float32, in the order in which the tensors follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for layer in layers:
        for name, shape in zip(layer.names, layer.shapes, strict=True):
            end = at + 4 * shape[0] * shape[1]
            entries[PREFIX + name] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _config(layers: Sequence[Layer]) -> dict[str, Any]:
    """PEFT's config of the new adapter: alpha is r everywhere, so every scale is 1."""
    rank = max(layer.rank for layer in layers)
    other = {layer.path: layer.rank for layer in layers if layer.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [layer.path for layer in layers],
        "rank_pattern": other,
        "alpha_pattern": other,
        "bias": "none",
        "inference_mode": True,
    }
