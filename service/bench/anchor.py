"""The anchor: PEFT in whichever compute dtype is faster on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.bench.peer import PeerProcess
from service.bench.peft_peer import MIXED
from service.bench.scenario import DISTINCT, job

TRIAL_TOKENS = 8
_TRIALS = (-2, -1)  # rounds that are never measured, so no prompt comes twice; the first warms up


def anchor(
    start: Callable[[str], PeerProcess], dtypes: Sequence[str], vocabulary: int, prompt_tokens: int
) -> tuple[PeerProcess, dict[str, float]]:
    """The fastest peer, running, and the tokens/s of a short mixed batch in each dtype."""
    rates: dict[str, float] = {}
    best: PeerProcess | None = None
    for dtype in dtypes:
        peer = start(dtype)
        for number in _TRIALS:
            result = peer.run(job(DISTINCT, number, vocabulary, prompt_tokens, TRIAL_TOKENS), MIXED)
        faster = not rates or result.tokens_per_second > max(rates.values())
        rates[dtype] = result.tokens_per_second
        loser, best = (best, peer) if faster else (peer, best)
        if loser is not None:
            loser.close()
    assert best is not None
    return best, rates
