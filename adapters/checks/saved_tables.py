"""Whole embedding tables that PEFT writes beside an adapter (`save_embedding_layers`).

Loading such a file puts them in the place of the base's own, as modules_to_save does. A base that
was resized in training is saved so too; its tables have another number of rows, and the adapter
then has a vocabulary of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.promises import PREFIX
from adapters.safetensors_header import Header, TensorEntry
from adapters.targets import with_ancestors
from adapters.tensor_values import CHUNK_BYTES
from adapters.vocabulary import table_shapes
from base.spec import BaseSpec

# Where PEFT's wrappers keep a table, those first that hold it as the training found it.
BEFORE = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")
TABLE_LEAVES = (*BEFORE, "weight")
DOUBLES = ("modules_to_save.weight", "original_module.weight")  # beside `weight`, said twice


def vocabulary_of(header: Header, spec: BaseSpec, limits: Limits) -> int:
    """The rows of the file's whole tables: the base's own number where there are none.

    Raises InvalidAdapter where tables differ in it, or where rows that the base has not are left
    out of the file; TooLarge for too many new ones.
    """
    shapes, found = table_shapes(spec), dict[str, TensorEntry]()
    for path, (_, width) in shapes.items():
        for leaf in (*TABLE_LEAVES, "modules_to_save.weight"):
            entry = header.tensors.get(f"{PREFIX}{path}.{leaf}")
            if entry and len(entry.shape) == 2 and entry.shape[1] == width and entry.shape[0]:
                found.setdefault(path, entry)
    sizes = {entry.shape[0]: entry for entry in found.values()}
    if len(sizes) > 1:
        one, two = list(sizes.values())[:2]
        raise InvalidAdapter(
            f"{two.shape[0]} rows, and {one.name} has {one.shape[0]}: the two have one vocabulary",
            two.name,
        )
    own = own_rows(spec)
    if not sizes or own in sizes:
        return own
    (rows,) = sizes
    entry = sizes[rows]
    if rows - own > limits.max_new_rows:
        found_here = f"{rows - own} new rows beyond the base's {own}"
        raise TooLarge(f"{found_here}, limit {limits.max_new_rows}", entry.name)
    if rows > own and not spec.tied_embeddings:
        _check_all_there(shapes, found, entry, own)
    return rows


def _check_all_there(
    shapes: Mapping[str, object], found: Mapping[str, TensorEntry], entry: TensorEntry, own: int
) -> None:
    missing = next((path for path in shapes if path not in found), None)
    if missing is not None:
        rows, width = entry.shape
        raise InvalidAdapter(
            f"shape {[rows, width]}, expected {[own, width]}, or as many rows of {missing} in the "
            f"file: the vocabulary was resized from {own} to {rows} rows, and PEFT itself would "
            f"draw the new ones of {missing} anew at each start; name it among the targets or in "
            "modules_to_save too",
            entry.name,
        )


def own_rows(spec: BaseSpec) -> int:
    """Rows of the base's own tables."""
    return next((rows for rows, _ in table_shapes(spec).values()), spec.vocab_size)


def with_saved_tables(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, fd: int
) -> Mapping[str, Any]:
    """The config with every whole table of the file in its modules_to_save.

    `spec` has the file's vocabulary. Raises InvalidAdapter where two tables that are one matrix in
    this base differ.
    """
    tables = table_shapes(spec)
    for path in tables:
        _check_doubles(path, header, fd)
    named = config.get("modules_to_save")
    if named is not None and not isinstance(named, list):
        return config  # refused by the field's own rule
    found = {p: t for p in tables if (t := header.tensors.get(f"{PREFIX}{p}.weight"))}
    more = [path for path in found if not _is_named(path, named or ())]
    if not more:
        return config
    if spec.tied_embeddings:
        _check_tied(more, found, tables, fd)
    return {**config, "modules_to_save": [*(named or ()), *more]}


def doubles(header: Header, spec: BaseSpec) -> dict[str, TensorEntry]:
    """What PEFT says twice of a table in modules_to_save: it saves the wrapper's state as well."""
    names = (
        f"{PREFIX}{path}.{leaf}"
        for path in table_shapes(spec)
        for leaf in DOUBLES
        if f"{PREFIX}{path}.weight" in header.tensors
    )
    return {name: header.tensors[name] for name in names if name in header.tensors}


def _check_doubles(path: str, header: Header, fd: int) -> None:
    whole = header.tensors.get(f"{PREFIX}{path}.weight")
    for leaf in DOUBLES:
        entry = header.tensors.get(f"{PREFIX}{path}.{leaf}")
        if whole is None or entry is None:
            continue
        if entry.shape != whole.shape:
            raise InvalidAdapter(
                f"shape {list(entry.shape)}, expected {list(whole.shape)} as {whole.name}",
                entry.name,
            )
        if leaf == "modules_to_save.weight" and not _same_bytes(fd, whole, entry):
            raise InvalidAdapter(f"differs from {whole.name}, which PEFT loads", entry.name)


def _is_named(path: str, names: list[Any] | tuple[()]) -> bool:
    suffixes = tuple(name for name in names if isinstance(name, str))
    return any(part.endswith(suffixes) for part in with_ancestors(path))


def _check_tied(
    more: list[str],
    found: Mapping[str, TensorEntry],
    tables: Mapping[str, tuple[int, int]],
    fd: int,
) -> None:
    """PEFT loads all of them into one matrix, whichever comes last."""
    missing = [path for path in tables if path not in found]
    if missing:
        raise InvalidAdapter(
            f"is missing: {more[0]} is in the file, the two are one matrix in this base, and PEFT "
            "saves both; name the one in modules_to_save if only that was trained",
            f"{PREFIX}{missing[0]}.weight",
        )
    if len(more) > 1 and not _same_bytes(fd, found[more[0]], found[more[1]]):
        raise InvalidAdapter(
            f"differs from {more[0]}, and the two are one matrix in this base: name both in "
            "modules_to_save if each was trained on its own",
            found[more[1]].name,
        )


def _same_bytes(fd: int, one: TensorEntry, two: TensorEntry) -> bool:
    if one.dtype != two.dtype or one.stop - one.start != two.stop - two.start:
        return False
    return all(
        os.pread(fd, size, one.start + done) == os.pread(fd, size, two.start + done)
        for done in range(0, one.stop - one.start, CHUNK_BYTES)
        if (size := min(CHUNK_BYTES, one.stop - one.start - done))
    )
