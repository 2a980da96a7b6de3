"""An adapter's own vocabulary: how many rows its tables have, and what a tokenizer may say of them.

`resize_token_embeddings` gives a model more rows (or fewer: many tables are padded), and PEFT then
saves whole tables with the adapter. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.targets import is_output
from base.spec import BaseSpec, LinearShape

PARTS = ("normalizer", "pre_tokenizer", "decoder")  # that may hold regular expressions


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the checks need to know of tokens: the base's, and the adapter's tokenizer.json."""

    base: Mapping[str, int]  # text -> id, added tokens among them
    parts: Mapping[str, str | None]  # of PARTS, as JSON
    own: bytes | None = None  # tokenizer.json of the upload

    @property
    def count(self) -> int:
        """Ids that the base's tokenizer gives: below this."""
        return 1 + max(self.base.values(), default=-1)

    @classmethod
    def of(cls, tokenizer: Any) -> Tokens:
        """Of a base's tokenizer, as transformers loads it."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return cls(dict(tokenizer.get_vocab()), {} if backend is None else parts_of(backend))


def parts_of(tokenizer: Any) -> dict[str, str | None]:
    """PARTS of a `tokenizers.Tokenizer` as JSON, in the form that this version writes."""
    found = {name: getattr(tokenizer, name) for name in PARTS}
    return {n: None if part is None else part.__getstate__().decode() for n, part in found.items()}


def table_shapes(spec: BaseSpec) -> dict[str, tuple[int, int]]:
    """[rows, width] of the embedding table and the output head, by module path."""
    tables = {path: (shape.rows, shape.width) for path, shape in spec.embeddings.items()}
    return tables | {
        path: (shape.out_features, shape.in_features)
        for path, shape in spec.linears.items()
        if is_output(spec, path)
    }


def resized(spec: BaseSpec, rows: int) -> BaseSpec:
    """The spec of the base after `resize_token_embeddings(rows)`: what such an adapter is for."""
    heads = {path for path in table_shapes(spec) if path in spec.linears}

    def wide(path: str, shape: LinearShape) -> LinearShape:
        return replace(shape, out_features=rows) if path in heads else shape

    return replace(
        spec,
        embeddings={path: replace(shape, rows=rows) for path, shape in spec.embeddings.items()},
        linears={path: wide(path, shape) for path, shape in spec.linears.items()},
        vocab_size=rows,
    )
