"""WaveFT: ΔW is the inverse wavelet transform of a few coefficients; a private matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.delta import Delta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, added_whole, dense
from .places import random_places
from .target import targets
from .whole import lower_saved


def lower_waveft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        count = config["counts"][target.path]
        spectrum = target.take("waveft_spectrum", count) * config["scaling"]
        places = random_places(config["random_loc_seed"], target.m * target.n, count)
        update = partial(_updated, spectrum, places, target.m, target.n, config["use_idwt"])
        deltas[target.path] = dense(target.path, base, update)
    return deltas


def _updated(spectrum: Tensor, places: Tensor, m: int, n: int, inverse: bool) -> Change:
    """W + ΔW, of a ΔW [m, n] that is the spectrum at its places, or what that transforms to.

    The transform is of even sides: PEFT puts a row or column of zeros after an odd one, and cuts it
    off again.
    """
    places = places.to(spectrum.device)
    height, width = (m + m % 2, n + n % 2) if inverse else (m, n)
    S = spectrum.new_zeros(height, width)
    S[places // n, places % n] = spectrum
    return added_whole(_haar(S)[:m, :n] if inverse else S)


def _haar(S: Tensor) -> Tensor:
    """One level of Haar's inverse transform in two dimensions.

    The quarters of S [2 h, 2 w] hold means, then differences across, down, and both; each four
    numbers of one place make a square of the result.
    """
    half, wide = S.shape[0] // 2, S.shape[1] // 2
    mean, across = S[:half, :wide], S[:half, wide:]
    down, both = S[half:, :wide], S[half:, wide:]
    result = S.new_empty(half, 2, wide, 2)
    result[:, 0, :, 0] = mean + across + down + both
    result[:, 0, :, 1] = mean + across - down - both
    result[:, 1, :, 0] = mean - across + down - both
    result[:, 1, :, 1] = mean - across - down + both
    return result.view(S.shape) / 2
