"""Whole embedding tables that PEFT writes beside an adapter (`save_embedding_layers`).

Loading such a file puts them in the place of the base's own, as modules_to_save does. A base that
was resized in training is saved so too; its tables have another number of rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.promises import PREFIX
from adapters.safetensors_header import Header, TensorEntry
from adapters.targets import is_output, with_ancestors
from adapters.tensor_values import CHUNK_BYTES
from base.spec import BaseSpec

_LEAVES = (  # where PEFT's wrappers keep a table
    "weight",
    "base_layer.weight",
    "token_adapter.base_layer.weight",
    "modules_to_save.weight",
    "original_module.weight",
)


def with_saved_tables(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, fd: int
) -> Mapping[str, Any]:
    """The config with every whole table of the file in its modules_to_save.

    Raises InvalidAdapter where a table has other rows than the base's, or where two that are one
    matrix in this base differ.
    """
    tables = _tables(spec)
    for path, shape in tables.items():
        _check_rows(path, shape, header)
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


def _tables(spec: BaseSpec) -> dict[str, tuple[int, int]]:
    tables = {path: (shape.rows, shape.width) for path, shape in spec.embeddings.items()}
    return tables | {
        path: (shape.out_features, shape.in_features)
        for path, shape in spec.linears.items()
        if is_output(spec, path)
    }


def _check_rows(path: str, shape: tuple[int, int], header: Header) -> None:
    for leaf in _LEAVES:
        entry = header.tensors.get(f"{PREFIX}{path}.{leaf}")
        if entry and len(entry.shape) == 2 and entry.shape != shape and entry.shape[1] == shape[1]:
            rows, own = entry.shape[0], shape[0]
            raise InvalidAdapter(
                f"shape {list(entry.shape)}, expected {list(shape)}: the vocabulary was resized "
                f"from {own} to {rows} rows, and this base's tokenizer and output head know "
                f"{own}. Serve a base that was resized alike (resize_token_embeddings({rows}) and "
                f"save it), or train rows below {own} with trainable_token_indices",
                entry.name,
            )


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
