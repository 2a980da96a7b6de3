"""Chooses the next token of each row of logits.

Greedy is the argmax of the logits. Otherwise: bias, penalties, the grammar's mask, temperature,
top-k, top-p, min-p in the order of transformers' own processors, then inverse transform sampling
with one uniform number that depends only on the sequence's seed and the position: the same seed
gives the same text whatever else runs, after a preemption too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from base import kernels
from service.engine.guide import Walk
from service.engine.request import Sampling
from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token with its log-probability under the model's own, unprocessed logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, best first


class Sampler:
    """Stateless but for the base's end-of-sequence tokens and the number of its tokens."""

    def __init__(self, eos_token_ids: frozenset[int], vocabulary: int = 0) -> None:
        """`vocabulary` 0: every row is the base's from end to end."""
        self.eos_token_ids = eos_token_ids
        self.vocabulary = vocabulary

    def own(self, row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """The part of a row of logits that is of the sequence's own vocabulary."""
        return row[: sequence.vocabulary or self.vocabulary or len(row)]

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
        """logits [L, V] fp32, one row per sequence -> a token each.

        V is that of the largest vocabulary; what stands in a row beyond its own is not looked at,
        so that its numbers are the same bits whatever its neighbours know.
        None where the row is not finite: that sequence has failed, its neighbours have not.
        """
        width = logits.shape[-1]
        rows: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            rows.setdefault(sequence.vocabulary or self.vocabulary or width, []).append(i)
        if rows.keys() <= {width}:
            return self._sample(logits, sequences)
        found: dict[int, Sampled | None] = {}
        for own, mine in rows.items():
            part = self._sample(logits[mine, :own], [sequences[i] for i in mine])
            found.update(zip(mine, part, strict=True))
        return [found[i] for i in range(len(sequences))]

    def _sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
        chosen, normaliser = kernels.greedy(logits)
        special = [i for i, s in enumerate(sequences) if self._is_special(s)]
        for i in special:
            chosen[i] = self._choose(logits[i], sequences[i])
        values = logits.gather(-1, chosen[:, None])[:, 0] - normaliser
        finite = normaliser.isfinite().tolist()
        tokens, logprobs = chosen.tolist(), values.tolist()
        return [
            Sampled(
                tokens[i],
                logprobs[i],
                likeliest(logits[i], normaliser[i], s.request.sampling.top_logprobs),
            )
            if finite[i]
            else None
            for i, s in enumerate(sequences)
        ]

    def _is_special(self, sequence: Sequence) -> bool:
        sampling = sequence.request.sampling
        return (
            sampling.do_sample
            or sequence.walk is not None
            or bool(sampling.logit_bias)
            or bool(self._held_back(sequence))
            or (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            != (1.0, 0.0, 0.0)
        )

    def _held_back(self, sequence: Sequence) -> list[int]:
        """Tokens that would end the sequence and must not yet. Where nothing ends it, with
        ignore_eos and no stop tokens, there are none, and the row is left as it is."""
        sampling = sequence.request.sampling
        if sequence.generated >= sampling.min_new_tokens:
            return []
        ends = () if sampling.ignore_eos else self.eos_token_ids
        return [*ends, *sampling.stop_token_ids]

    def _choose(self, logits: torch.Tensor, sequence: Sequence) -> int:
        sampling = sequence.request.sampling
        row = logits.clone()
        for token, bias in sampling.logit_bias:
            if token < len(row):  # an adapter's own table may be the shorter one
                row[token] += bias
        _penalise(row, sequence, sampling)
        if held := self._held_back(sequence):
            row[[token for token in held if token < len(row)]] = -torch.inf
        if sequence.walk is not None:
            row = guided(row, logits, sequence.walk)
        if not sampling.do_sample or sampling.temperature == 0.0:
            return int(row.argmax())
        values, tokens = (row / sampling.temperature).sort(descending=True, stable=True)
        probabilities = truncate(values, sampling).cpu().double()
        point = uniform(sequence.seed, len(sequence.tokens)) * float(probabilities.sum())
        place = int(torch.searchsorted(probabilities.cumsum(0), point, right=True))
        last = int(probabilities.count_nonzero()) - 1
        return int(tokens[min(place, last)])


def guided(row: torch.Tensor, logits: torch.Tensor, walk: Walk) -> torch.Tensor:
    """The row [V] without the tokens that the grammar forbids.

    Where it allows only what was held back, an end that must not come yet, the grammar prevails.
    """
    allowed = torch.from_numpy(walk.allowed(len(row))).to(row.device)
    masked = row.masked_fill(~allowed, -torch.inf)
    return masked if bool(masked.isfinite().any()) else logits.masked_fill(~allowed, -torch.inf)


def truncate(values: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Sorted logits [V], largest first -> probabilities [V], zero for tokens that are cut off."""
    kept = values.clone()
    if 0 < sampling.top_k < len(kept):
        kept[kept < kept[sampling.top_k - 1]] = -torch.inf
    if sampling.top_p < 1.0:
        probabilities = kept.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of all more likely tokens
        kept[(before >= sampling.top_p).logical_and_(before > 0)] = -torch.inf
    probabilities = kept.softmax(-1)
    if sampling.min_p > 0.0:
        probabilities[probabilities < sampling.min_p * probabilities[0]] = 0.0
    return probabilities


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, Salmon et al. 2011)."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, 0, 0, position])
    return float(np.random.Generator(bits).random())


def _penalise(row: torch.Tensor, sequence: Sequence, sampling: Sampling) -> None:
    if sampling.repetition_penalty != 1.0:  # over prompt and output (Keskar et al. 2019)
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        score = row[seen]
        factor = sampling.repetition_penalty
        row[seen] = torch.where(score < 0, score * factor, score / factor)
    if sampling.presence_penalty or sampling.frequency_penalty:  # over the output alone
        counts = Counter(sequence.tokens[sequence.prompt_length :])
        if counts:
            ids = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def likeliest(
    logits: torch.Tensor, normaliser: torch.Tensor, count: int
) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of a row [V], best first, with their log-probabilities."""
    if not count:
        return ()
    values, tokens = kernels.largest(logits, min(count, len(logits)))
    return tuple(zip(tokens.tolist(), (values - normaliser).tolist(), strict=True))
