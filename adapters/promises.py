"""The tensors that a config promises, paired with those of the file: nothing is left over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from adapters.errors import InvalidAdapter
from adapters.safetensors_header import TensorEntry
from adapters.targets import module_paths, with_ancestors
from base.spec import BaseSpec

PREFIX = "base_model.model."
SHARED = "base_model."  # before the names of what all layers share


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor that the config promises."""

    module: str
    shape: tuple[int, ...]
    role: str  # a method's own, or "bias" | "saved" | "copy" (of the base's own table)
    why: str = ""


def whole_module(spec: BaseSpec, path: str) -> Iterator[tuple[str, Expected]]:
    """What PEFT saves of a module in modules_to_save."""
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


def consume(
    tensors: Mapping[str, TensorEntry],
    promised: Mapping[str, Expected],
    spec: BaseSpec,
    targets: Iterable[str],
    optional: Mapping[str, Expected] | None = None,
) -> dict[str, Expected]:
    """Pair the file's tensors with the promised ones; nothing may be left on either side.

    `targets` are the module paths that the method adapts; `optional` is what may be there too.
    Raises InvalidAdapter, naming the tensor.
    """
    found: dict[str, Expected] = {}
    open_promises = dict(promised)
    copies = {**dict(_base_copies(spec, targets)), **(optional or {})}
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
        elif path in spec.linears and not spec.linears[path].quantized:
            linear = spec.linears[path]
            yield name, Expected(path, (linear.out_features, linear.in_features), "copy")


def _without_weight(name: str) -> str:
    """Some versions of PEFT wrote `lora_magnitude_vector.weight`; it is the same tensor."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _left_over(name: str, spec: BaseSpec, promised: Mapping[str, Expected]) -> str:
    if not name.startswith(PREFIX):
        return f"unknown tensor: names begin with {PREFIX!r}"
    path = name.removeprefix(PREFIX)
    module = next((p for p in with_ancestors(path) if p in set(module_paths(spec))), None)
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
