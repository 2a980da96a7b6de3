"""An adapter's virtual tokens in the KV cache: whose blocks they are, what has to be written.

The sequences of one adapter share the blocks that virtual tokens fill, whatever the tenant: known
blocks like those of any prefix, so they come back to the pool when nobody uses them, and they are
written anew from the adapter when they are wanted again. The rest of the virtual tokens begins the
first block that holds tokens of a sequence, so each sequence has its own copy. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from service.engine.kv_cache import chain_hash
from service.engine.request import AdapterKey
from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Fill:
    """Write virtual tokens [start, start + count) of an adapter at the beginning of a block."""

    block: int
    adapter: AdapterKey
    start: int
    count: int


def fills(sequence: Sequence, known: int, size: int) -> Iterator[Fill]:
    """What to write before the sequence runs, when its first `known` blocks hold what they should.

    `size` is that of a block; `sequence.blocks` are allocated.
    """
    virtual = sequence.virtual_tokens
    if sequence.adapter is None or not virtual:
        return
    for index in range(known, -(-virtual // size)):
        start = index * size
        count = min(size, virtual - start)
        yield Fill(sequence.blocks[index], sequence.adapter.key, start, count)


def block_hash(sequence: Sequence, index: int, size: int) -> bytes:
    """Identity of the sequence's full block `index`; `sequence.hashes` has those before it.

    The chain of virtual tokens begins with the adapter, that of the sequence's own tokens with its
    namespace, which the adapter is a part of: so the virtual tokens before them are implied.
    """
    start = index * size - sequence.virtual_tokens
    stop = start + size
    if stop <= 0 and sequence.adapter is not None:
        return chain_hash(sequence.hashes[-1] if index else _namespace(sequence.adapter.key), ())
    previous = sequence.hashes[-1] if start > 0 else sequence.namespace
    return chain_hash(previous, sequence.tokens[max(start, 0) : stop])


def _namespace(key: AdapterKey) -> bytes:
    return chain_hash(b"virtual tokens of " + "/".join(key).encode(), ())
