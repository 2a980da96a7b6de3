"""Which tensors a LoRA config promises on a given base, and whether the file keeps the promise."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.config_schema import LoraFields
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.safetensors_header import TensorEntry
from base.spec import BaseSpec

PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor that the config promises."""

    module: str
    shape: tuple[int, ...]
    role: str  # "A" | "B" | "lora_bias" | "magnitude" | "bias" | "saved" | "copy"
    why: str = ""


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Every tensor of the file by name, and the rank and alpha of every low-rank target."""

    tensors: Mapping[str, Expected]
    ranks: Mapping[str, int]  # module path -> r
    alphas: Mapping[str, float]
    saved: tuple[str, ...]  # module paths that the adapter replaces whole

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that the adapter touches, sorted."""
        return tuple(sorted({expected.module for expected in self.tensors.values()}))


def match_lora(
    fields: LoraFields, tensors: Mapping[str, TensorEntry], spec: BaseSpec, limits: Limits
) -> LoraLayout:
    """Match the tensors of a file with what the config promises, both ways.

    A string `target_modules` and the keys of the patterns are regular expressions of the user:
    call this only where time is bounded (`validate_in_child`). The layout holds plain paths only.

    Raises InvalidAdapter or TooLarge, naming the tensor or the field.
    """
    saved = _saved_modules(fields, spec)
    targets = _target_modules(fields, spec)
    if not targets:
        raise InvalidAdapter("no module of this base is targeted", "target_modules")
    both = sorted(saved.intersection(targets))
    if both:
        raise InvalidAdapter(f"{both[0]} is a LoRA target too", "modules_to_save")
    ranks = {path: (_matches(fields.rank_pattern, path) or [fields.r])[0] for path in targets}
    alphas = {path: _alpha(fields, path) for path in targets}
    _check_scales(fields, ranks, alphas, limits)
    promised = dict(_promised(fields, spec, ranks, saved))
    found = _consume(tensors, promised, spec, targets)
    return LoraLayout(found, ranks, alphas, tuple(sorted(saved)))


def canonical_config(fields: LoraFields, layout: LoraLayout) -> dict[str, Any]:
    """The config with every pattern resolved to module paths, defaults filled in, the rest dropped.

    It is still a valid PEFT config, and two configs that mean the same give the same one. Look the
    ranks up by exact path: `rank_pattern.get(path, r)`, `alpha_pattern.get(path, lora_alpha)`.
    """
    return {
        "peft_type": "LORA",
        "r": fields.r,
        "lora_alpha": fields.alpha,
        "target_modules": sorted(layout.ranks),
        "rank_pattern": _differing(layout.ranks, fields.r),
        "alpha_pattern": _differing(layout.alphas, fields.alpha),
        "modules_to_save": list(layout.saved) or None,
        "bias": fields.bias,
        "use_rslora": fields.use_rslora,
        "use_dora": fields.use_dora,
        "lora_bias": fields.lora_bias,
    }


def _differing(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {path: value for path, value in sorted(values.items()) if value != default}


# Which modules ----------------------------------------------------------------------------------


def _target_modules(fields: LoraFields, spec: BaseSpec) -> list[str]:
    """PEFT's rule (`check_target_module_exists`) over this base's module paths."""
    targets = [path for path in _paths(spec) if _is_target(fields, spec, path)]
    wrong = next((path for path in targets if path in spec.norms), None)
    if wrong:
        raise InvalidAdapter(f"{wrong} is a norm: LoRA wants linears", "target_modules")
    if fields.ensure_weight_tying and spec.tied_embeddings:
        targets += [path for path in _tied_with(spec, targets) if path not in targets]
    return targets


def _is_target(fields: LoraFields, spec: BaseSpec, path: str) -> bool:
    if _listed(fields.exclude_modules, path) or _inside(fields.modules_to_save, path):
        return False
    targets = fields.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return path in spec.linears and not _is_output(spec, path)
    if isinstance(targets, str) or path in targets:
        return _listed(targets, path)
    return _listed(targets, path) and _in_layers(fields, path)


def _listed(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _inside(names: tuple[str, ...], path: str) -> bool:
    return any(f".{name}." in f".{path}." for name in names)


def _is_output(spec: BaseSpec, path: str) -> bool:
    """The output layer, which `all-linear` leaves out: the one whose rows are the vocabulary."""
    shape = spec.linears[path]
    return not shape.quantized and "." not in path and shape.in_features == spec.hidden_size


def _in_layers(fields: LoraFields, path: str) -> bool:
    if fields.layers_to_transform is None:
        return True
    if not fields.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        found = (
            re.match(rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\.", path) for p in fields.layers_pattern
        )
        match = next((m for m in found if m), None)
    return match is not None and int(match[1]) in fields.layers_to_transform


def _saved_modules(fields: LoraFields, spec: BaseSpec) -> set[str]:
    """PEFT's rule (`_set_trainable`): a name is a bare suffix, no dot needed before it."""
    saved: set[str] = set()
    for name in fields.modules_to_save:
        matched = {
            path for path in _paths(spec) if any(p.endswith(name) for p in _with_ancestors(path))
        }
        if not matched:
            raise InvalidAdapter(f"this base has no module {name!r}", "modules_to_save")
        saved |= matched
    if fields.ensure_weight_tying and spec.tied_embeddings:
        saved |= set(_tied_with(spec, saved))
    return saved


def _tied_with(spec: BaseSpec, paths: Iterable[str]) -> list[str]:
    tied = [
        p for p in (*spec.embeddings, *spec.linears) if p in spec.embeddings or _is_output(spec, p)
    ]
    return [path for path in tied if set(tied) & set(paths)]


def _with_ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _paths(spec: BaseSpec) -> tuple[str, ...]:
    return (*spec.linears, *spec.embeddings, *spec.norms)


def _matches(patterns: Mapping[str, Any], path: str) -> list[Any]:
    """PEFT's `get_pattern_key`: values whose key matches the path or the end of it, in order."""
    return [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)]


def _alpha(fields: LoraFields, path: str) -> float:
    """The first match. But PEFT sorts the keys when it saves, and in training another was first.

    For ranks the shapes tell; for an alpha nothing does.
    """
    found = _matches(fields.alpha_pattern, path) or [fields.alpha]
    if len(set(found)) > 1:
        raise InvalidAdapter(
            f"several keys match {path}, with alphas {found}: which one came first in training "
            "is lost when PEFT saves; write one key per module",
            "alpha_pattern",
        )
    return float(found[0])


def _check_scales(
    fields: LoraFields, ranks: Mapping[str, int], alphas: Mapping[str, float], limits: Limits
) -> None:
    for path, rank in ranks.items():
        if rank > limits.max_rank:
            raise TooLarge(f"rank {rank} for {path}, limit {limits.max_rank}", "r")
        scale = alphas[path] / (math.sqrt(rank) if fields.use_rslora else rank)
        if abs(scale) > limits.max_scale:
            raise InvalidAdapter(
                f"scale {scale:g} for {path} (alpha {alphas[path]:g}, rank {rank}), "
                f"limit {limits.max_scale:g}",
                "lora_alpha",
            )


# Which tensors ----------------------------------------------------------------------------------


def _promised(
    fields: LoraFields, spec: BaseSpec, ranks: Mapping[str, int], saved: set[str]
) -> Iterator[tuple[str, Expected]]:
    for path, rank in ranks.items():
        yield from _low_rank(fields, spec, path, rank)
    for path in saved:
        yield from _whole(spec, path)
    for path, linear in spec.linears.items():
        if linear.bias and path not in saved and _bias_is_saved(fields, path in ranks):
            name = f"{path}.base_layer.bias" if path in ranks else f"{path}.bias"
            yield PREFIX + name, Expected(path, (linear.out_features,), "bias")


def _bias_is_saved(fields: LoraFields, targeted: bool) -> bool:
    return fields.bias == "all" or (fields.bias == "lora_only" and targeted)


def _low_rank(
    fields: LoraFields, spec: BaseSpec, path: str, rank: int
) -> Iterator[tuple[str, Expected]]:
    why = f" for rank {rank}"
    start = f"{PREFIX}{path}."
    if path in spec.embeddings:
        table = spec.embeddings[path]
        if fields.lora_bias:
            raise InvalidAdapter(f"PEFT has no lora_bias for the embedding {path}", "lora_bias")
        out = table.width
        yield start + "lora_embedding_A", Expected(path, (rank, table.rows), "A", why)
        yield start + "lora_embedding_B", Expected(path, (out, rank), "B", why)
    else:
        linear = spec.linears[path]
        out = linear.out_features
        yield start + "lora_A.weight", Expected(path, (rank, linear.in_features), "A", why)
        yield start + "lora_B.weight", Expected(path, (out, rank), "B", why)
        if fields.lora_bias:
            yield start + "lora_B.bias", Expected(path, (out,), "lora_bias")
    if fields.use_dora:
        # An embedding's magnitude is per column of the table [rows, width], so [width] as well.
        yield start + "lora_magnitude_vector", Expected(path, (out,), "magnitude")


def _whole(spec: BaseSpec, path: str) -> Iterator[tuple[str, Expected]]:
    start = f"{PREFIX}{path}."
    if path in spec.norms:
        yield start + "weight", Expected(path, (spec.norms[path],), "saved")
    elif path in spec.embeddings:
        table = spec.embeddings[path]
        yield start + "weight", Expected(path, (table.rows, table.width), "saved")
    else:
        linear = spec.linears[path]
        yield start + "weight", Expected(path, (linear.out_features, linear.in_features), "saved")
        if linear.bias:
            yield start + "bias", Expected(path, (linear.out_features,), "saved")


def _consume(
    tensors: Mapping[str, TensorEntry],
    promised: Mapping[str, Expected],
    spec: BaseSpec,
    targets: Iterable[str],
) -> dict[str, Expected]:
    """Pair the file's tensors with the promised ones; nothing may be left on either side."""
    found: dict[str, Expected] = {}
    open_promises = dict(promised)
    copies = dict(_base_copies(spec, targets))
    for name, entry in tensors.items():
        plain = _without_weight(name)
        expected = open_promises.pop(plain, None) or copies.pop(plain, None)
        if expected is None:
            raise InvalidAdapter(_left_over(plain, spec, promised), name)
        if entry.shape != expected.shape:
            raise InvalidAdapter(
                f"shape {list(entry.shape)}, expected {list(expected.shape)}{expected.why}", name
            )
        found[name] = expected
    if open_promises:
        name, expected = next(iter(open_promises.items()))
        raise InvalidAdapter(
            f"is missing: the config promises it, shape {list(expected.shape)} "
            f"({len(open_promises)} tensors missing in all)",
            name,
        )
    return found


def _base_copies(spec: BaseSpec, targets: Iterable[str]) -> Iterator[tuple[str, Expected]]:
    """PEFT saves the base's own embeddings too when they are targets (`save_embedding_layers`)."""
    for path in targets:
        name = f"{PREFIX}{path}.base_layer.weight"
        if path in spec.embeddings:
            table = spec.embeddings[path]
            yield name, Expected(path, (table.rows, table.width), "copy")
        elif not spec.linears[path].quantized:
            linear = spec.linears[path]
            yield name, Expected(path, (linear.out_features, linear.in_features), "copy")


def _without_weight(name: str) -> str:
    """Some versions of PEFT wrote `lora_magnitude_vector.weight`; it is the same tensor."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _left_over(name: str, spec: BaseSpec, promised: Mapping[str, Expected]) -> str:
    if not name.startswith(PREFIX):
        return f"unknown tensor: names begin with {PREFIX!r}"
    path = name.removeprefix(PREFIX)
    module = next((p for p in _with_ancestors(path) if p in set(_paths(spec))), None)
    if name in promised:
        return "is given twice"
    if module is None:
        return "left over: this base has no such module"
    known = [
        n.removeprefix(f"{PREFIX}{module}.") for n, e in promised.items() if e.module == module
    ]
    if not known:
        return f"left over: the config does not touch {module}"
    return f"left over: expected only {', '.join(known)} for {module}"
