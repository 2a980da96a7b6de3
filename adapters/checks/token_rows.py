"""Rows of an embedding table or output head that an adapter has of its own: trained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapters.config_rules import MAX_REGEX, PLAIN_NAME
from adapters.errors import InvalidAdapter
from adapters.promises import PREFIX, Expected
from adapters.targets import is_output, module_paths, tied_with
from base.spec import BaseSpec

MAX_TOKENS = 65_536  # far above what this is for: beyond it, train the whole table

TokenRows = Mapping[str, tuple[int, ...]]  # module path -> tokens whose rows are the adapter's own


def token_list(name: str, value: Any) -> None:
    """A rule for a list of token ids, each once. Raises InvalidAdapter."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOKENS:
        found = f"{len(value)} tokens" if isinstance(value, list) else str(value)[:80]
        raise InvalidAdapter(f"{found}, expected a list of 1 to {MAX_TOKENS} token ids", name)
    seen: set[int] = set()
    for token in value:
        if type(token) is not int or token < 0:
            raise InvalidAdapter(f"{str(token)[:80]}, expected token ids from 0", name)
        if token in seen:
            raise InvalidAdapter(f"token {token} is there twice: which row is meant?", name)
        seen.add(token)


def token_indices(name: str, value: Any) -> None:
    """A rule for `trainable_token_indices`: a list, or one for each named module."""
    if value is None or value == [] or value == {}:
        return
    if not isinstance(value, dict):
        return token_list(name, value)
    for key, tokens in value.items():
        if len(key) > MAX_REGEX or not PLAIN_NAME.fullmatch(key):
            raise InvalidAdapter(f"{key[:80]!r} is not a module name", name)
        token_list(f"{name}[{key[:80]!r}]", tokens)


def resolve_indices(
    value: Sequence[int] | Mapping[str, Sequence[int]] | None,
    spec: BaseSpec,
    ensure_tying: bool,
    where: str = "trainable_token_indices",
) -> TokenRows:
    """PEFT's `set_additional_trainable_modules`: which tokens are trained in which module.

    Where the output head is the embedding table itself, its rows follow the table's, unless the
    config names both with different tokens. Raises InvalidAdapter.
    """
    if not value:
        return {}
    table = next(iter(spec.embeddings))
    named: Mapping[str, Sequence[int]] = value if isinstance(value, Mapping) else {table: value}
    rows: dict[str, tuple[int, ...]] = {}
    for name, tokens in named.items():
        for path in _named(name, spec, where):
            if path in rows and rows[path] != tuple(tokens):
                raise InvalidAdapter(f"{path} is named twice, with different tokens", where)
            rows[path] = tuple(tokens)
    return _with_tied(rows, spec, ensure_tying, where)


def _with_tied(
    rows: Mapping[str, tuple[int, ...]], spec: BaseSpec, ensure_tying: bool, where: str
) -> TokenRows:
    table = next((path for path in rows if path in spec.embeddings), None)
    found = dict(rows)
    if spec.tied_embeddings and table:
        for path in tied_with(spec, [table]):
            if found.setdefault(path, rows[table]) != rows[table] and ensure_tying:
                raise InvalidAdapter(
                    f"{path} and {table} have different tokens, and ensure_weight_tying is set",
                    where,
                )
    for path, tokens in found.items():
        check_place(path, spec, where)
        _check_tokens(path, tokens, spec, where)
    return dict(sorted(found.items()))


def _named(name: str, spec: BaseSpec, where: str) -> list[str]:
    """PEFT's rule (`_set_trainable`): a bare suffix, no dot needed before it."""
    paths = [path for path in module_paths(spec) if path.endswith(name)]
    if not paths:
        raise InvalidAdapter(f"this base has no module {name!r}", where)
    return paths


def check_place(path: str, spec: BaseSpec, where: str) -> None:
    """Raise InvalidAdapter where the rows of a module are no tokens."""
    if path in spec.embeddings:
        return
    if path not in spec.linears or not is_output(spec, path):
        places = [*spec.embeddings, *(p for p in spec.linears if is_output(spec, p))]
        raise InvalidAdapter(
            f"{path} has no rows for tokens, expected one of {', '.join(places)}", where
        )
    if spec.linears[path].bias:
        raise InvalidAdapter(f"{path} has a bias, which PEFT leaves out with trained tokens", where)


def _check_tokens(path: str, tokens: Iterable[int], spec: BaseSpec, where: str) -> None:
    rows = _shape(path, spec)[0]
    beyond = next((token for token in tokens if token >= rows), None)
    if beyond is not None:
        raise InvalidAdapter(
            f"token {beyond} of {path}: this base's table has {rows} rows, so it knows tokens 0 to "
            f"{rows - 1}; a table that was resized needs a base that is resized alike",
            where,
        )


def promised_rows(rows: TokenRows, spec: BaseSpec, leaf: str) -> dict[str, Expected]:
    """The tensors that PEFT always saves: of tied modules only the table's."""
    return {
        f"{PREFIX}{path}.{leaf}": Expected(
            path, (len(rows[path]), _shape(path, spec)[1]), "rows", f" for {len(rows[path])} tokens"
        )
        for path in rows
        if owner(path, rows, spec) == path
    }


def optional_rows(rows: TokenRows, spec: BaseSpec, leaf: str) -> dict[str, Expected]:
    """What PEFT may save beside them: a tied head's copy, and the base's own tables."""
    below = leaf.rpartition("trainable_tokens_delta")[0]
    found = {}
    for path in rows:
        shape = _shape(path, spec)
        if owner(path, rows, spec) != path:
            own = Expected(path, (len(rows[path]), shape[1]), "copy")
            found[f"{PREFIX}{path}.{leaf}"] = own
        found[f"{PREFIX}{path}.{below}base_layer.weight"] = Expected(path, shape, "copy")
    return found


def owner(path: str, rows: Mapping[str, Sequence[int]], spec: BaseSpec) -> str:
    """The module whose rows these are: the table's, where a head is tied to it."""
    if spec.tied_embeddings and path not in spec.embeddings:
        table = next((p for p in rows if p in spec.embeddings), path)
        return table if list(rows[table]) == list(rows[path]) else path
    return path


def rows_bytes(rows: TokenRows, spec: BaseSpec) -> Iterator[int]:
    """Of each owner's ids in 64 bits and rows in fp32; a tied head shares them."""
    for path, tokens in rows.items():
        if owner(path, rows, spec) == path:
            yield len(tokens) * (8 + 4 * _shape(path, spec)[1])


def _shape(path: str, spec: BaseSpec) -> tuple[int, int]:
    if path in spec.embeddings:
        return spec.embeddings[path].rows, spec.embeddings[path].width
    return spec.linears[path].out_features, spec.linears[path].in_features
