"""The anchor: PEFT in whichever compute dtype is faster on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.bench.peer import PeerProcess
from service.bench.peft_peer import MIXED
from service.bench.scenario import DISTINCT, job

TRIAL_TOKENS = 8
_WARM_UP = -1
_TRIALS = (-4, -3, -2)  # numbers of rounds that are never measured, so no prompt comes twice


def anchor(
    start: Callable[[str], PeerProcess], dtypes: Sequence[str], vocabulary: int, prompt_tokens: int
) -> tuple[PeerProcess, dict[str, float]]:
    """The fastest peer, running, and the tokens/s of a short mixed batch in each dtype.

    The dtypes take turns and the best try of each counts: a busy moment must not choose. Where
    there is one dtype only, nothing is tried.
    """
    if len(dtypes) == 1:
        return start(dtypes[0]), {}
    peers = {dtype: start(dtype) for dtype in dtypes}
    rates = dict.fromkeys(dtypes, 0.0)
    for number in (_WARM_UP, *_TRIALS):
        for dtype, peer in peers.items():
            result = peer.run(job(DISTINCT, number, vocabulary, prompt_tokens, TRIAL_TOKENS), MIXED)
            if number != _WARM_UP:
                rates[dtype] = max(rates[dtype], result.tokens_per_second)
    fastest = max(dtypes, key=rates.__getitem__)
    for dtype, peer in peers.items():
        if dtype != fastest:
            peer.close()
    return peers[fastest], rates
