"""The block pool: who owns which page of the KV cache, and which pages hold a known prefix.

No torch here: blocks are integers. A block is in exactly one of three states:

    free      on the free list, holds nothing worth keeping
    cached    nobody uses it, but its content is a known prefix; taken last, oldest first
    used      reference count >= 1; with a hash it can be shared by more sequences

free + cached + used = total, always (`check_integrity`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(slots=True)
class _Block:
    references: int = 0
    hash: bytes | None = None
    owner: str = ""  # adapter digest of the prefix that it holds


def chain_hash(previous: bytes, tokens: Seq[int]) -> bytes:
    """Identity of a full block: everything before it (or the namespace) and its own tokens."""
    digest = hashlib.blake2b(previous, digest_size=32)
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.digest()


class BlockPool:
    """Allocates, shares and releases the `total` blocks of `block_size` tokens."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(total)]
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_hash: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= self.available

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one owner; the caller has asked `can_allocate`."""
        assert self.can_allocate(count)
        return [self._take() for _ in range(count)]

    def lookup(self, hashes: Seq[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `hashes`. Takes no reference."""
        found: list[int] = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Seq[int]) -> int:
        """How many of these known blocks nobody uses: sharing them lowers `available`."""
        return sum(self._blocks[block].references == 0 for block in blocks)

    def share(self, blocks: Seq[int]) -> None:
        """One more reference to each of these known blocks."""
        for block in blocks:
            if self._blocks[block].references == 0:
                del self._cached[block]
            self._blocks[block].references += 1

    def remember(self, block: int, digest: bytes, owner: str) -> None:
        """The block is full and holds the prefix `digest`; the first block of a prefix is kept."""
        entry = self._blocks[block]
        if entry.hash is None and digest not in self._by_hash:
            entry.hash, entry.owner = digest, owner
            self._by_hash[digest] = block

    def deallocate(self, blocks: Seq[int]) -> None:
        """One reference less. The last blocks of a prefix are forgotten before its first ones."""
        for block in reversed(blocks):
            entry = self._blocks[block]
            assert entry.references > 0, f"block {block} was released twice"
            entry.references -= 1
            if entry.references == 0:
                if entry.hash is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def forget(self, owner: str) -> int:
        """Drop all prefixes of one adapter; returns how many blocks held one."""
        count = 0
        for index, entry in enumerate(self._blocks):
            if entry.hash is not None and entry.owner == owner:
                self._unhash(index)
                count += 1
                if entry.references == 0:
                    del self._cached[index]
                    self._free.append(index)
        return count

    def check_integrity(self) -> None:
        """Raise AssertionError when a block is lost, counted twice or wrongly known."""
        used = [i for i, entry in enumerate(self._blocks) if entry.references > 0]
        assert len(self._free) + len(self._cached) + len(used) == self.total
        assert len({*self._free, *self._cached, *used}) == self.total
        assert all(self._blocks[i].hash is None for i in self._free)
        assert all(self._blocks[i].hash is not None for i in self._cached)
        assert self._by_hash == {e.hash: i for i, e in enumerate(self._blocks) if e.hash}

    def references(self) -> int:
        """Sum of all references: what the living sequences hold together."""
        return sum(entry.references for entry in self._blocks)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unhash(block)
        self._blocks[block].references = 1
        return block

    def _unhash(self, block: int) -> None:
        entry = self._blocks[block]
        assert entry.hash is not None
        del self._by_hash[entry.hash]
        entry.hash, entry.owner = None, ""
