"""The block pool: sharing, forgetting, and the sum that must always come out."""

from __future__ import annotations

import pytest

from service.engine.kv_cache import BlockPool, chain_hash


def hashes(tokens: list[int], size: int, salt: bytes = b"") -> list[bytes]:
    chain, previous = [], salt
    for start in range(0, len(tokens) - size + 1, size):
        previous = chain_hash(previous, tokens[start : start + size])
        chain.append(previous)
    return chain


def test_allocated_blocks_are_distinct_and_come_back() -> None:
    pool = BlockPool(8, 4)
    blocks = pool.allocate(8)
    assert sorted(blocks) == list(range(8))
    assert not pool.can_allocate(1)
    pool.deallocate(blocks)
    assert pool.available == 8
    pool.check_integrity()


def test_a_known_prefix_is_found_and_shared() -> None:
    pool = BlockPool(8, 4)
    chain = hashes(list(range(12)), 4)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, chain, strict=True):
        pool.remember(block, digest, "a")
    pool.deallocate(blocks)
    assert pool.available == 8
    assert pool.lookup(chain) == blocks
    pool.share(blocks[:2])
    assert pool.used == 2
    pool.check_integrity()


def test_the_salt_and_every_token_before_matter() -> None:
    tokens = list(range(8))
    changed = [99, *tokens[1:]]
    assert hashes(tokens, 4)[1] != hashes(changed, 4)[1]
    assert not set(hashes(tokens, 4, b"a")) & set(hashes(tokens, 4, b"b"))


def test_a_block_that_is_taken_again_is_no_longer_known() -> None:
    pool = BlockPool(2, 4)
    chain = hashes(list(range(8)), 4)
    blocks = pool.allocate(2)
    for block, digest in zip(blocks, chain, strict=True):
        pool.remember(block, digest, "a")
    pool.deallocate(blocks)
    taken = pool.allocate(1)
    assert taken == [blocks[1]], "the end of a prefix goes before its beginning"
    assert pool.lookup(chain) == blocks[:1]
    pool.check_integrity()


def test_forgetting_an_adapter_drops_its_prefixes_alone() -> None:
    pool = BlockPool(4, 4)
    mine, theirs = pool.allocate(1), pool.allocate(1)
    pool.remember(mine[0], b"mine", "a")
    pool.remember(theirs[0], b"theirs", "b")
    pool.deallocate(mine)
    assert pool.forget("a") == 1
    assert pool.lookup([b"mine"]) == []
    assert pool.lookup([b"theirs"]) == theirs
    pool.check_integrity()


def test_a_used_block_that_is_forgotten_stays_with_its_user() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(1)
    pool.remember(blocks[0], b"x", "a")
    pool.forget("a")
    assert pool.used == 1
    pool.deallocate(blocks)
    assert pool.available == 4
    pool.check_integrity()


def test_releasing_twice_is_our_bug_and_says_so() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.deallocate(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.deallocate(blocks)
