"""The last check of an upload: a trial run of an adapter that is not served yet."""

from __future__ import annotations

from adapters.checks.prefix import check_room
from adapters.delta import LoweredAdapter
from adapters.errors import InvalidAdapter
from service.engine.attention import KVCache
from service.engine.batch import build_batch
from service.engine.model_runner import ModelRunner
from service.engine.prefix import fills
from service.engine.request import AdapterRef, Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence


def try_out(runner: ModelRunner, adapter: LoweredAdapter, context: int) -> None:
    """Run the adapter over two tokens behind its virtual ones, in a cache of its own: it waits for
    no block, and nobody's block is touched. `context` is that of a sequence, in tokens.

    Raises InvalidAdapter when it leaves no room for a prompt, cannot be computed, or its logits
    are not finite.
    """
    base, size = runner.base, runner.cache.block_size
    virtual = adapter.prefix.tokens if adapter.prefix else 0
    if virtual:
        check_room(virtual, context, "server")
    known = adapter.vocabulary or base.spec.vocab_size
    tokens = [0, known - 1]
    ref = AdapterRef(adapter.digest, "probe", virtual_tokens=virtual, vocabulary=adapter.vocabulary)
    request = Request("probe", tuple(tokens), adapter=ref)
    sequence = Sequence(0, request, 0, 0, tokens, len(tokens), b"")
    blocks = -(-(virtual + len(tokens)) // size)
    sequence.blocks = list(range(blocks))
    cache = KVCache(base.spec, blocks, size, runner.cache.dtype, base.device)
    try:
        batch = build_batch([Chunk(sequence, 0, len(tokens))], size)
        runner.fill(fills(sequence, 0, size), {ref.key: adapter}, cache)
        logits = runner.run(batch, {ref.key: adapter}, cache)
        finite = bool(logits[:, :known].isfinite().all())
    except Exception as error:
        raise InvalidAdapter(f"a trial run failed: {error}") from error
    finally:
        runner.forget(adapter.digest)
    if not finite:
        raise InvalidAdapter("its logits are not finite in a trial run of two tokens")
