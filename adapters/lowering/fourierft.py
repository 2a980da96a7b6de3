"""FourierFT: ΔW is the inverse Fourier transform of a few coefficients; a private matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, added_whole, dense
from .places import random_places
from .target import targets
from .whole import lower_saved

_STRIP = 1024  # columns that are transformed at a time


def lower_fourierft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        count = config["n_frequency_pattern"].get(target.path, config["n_frequency"])
        spectrum = target.take("fourierft_spectrum", count)
        places = random_places(config["random_loc_seed"], target.m * target.n, count)
        S = (spectrum * config["scaling"], places, target.m, target.n)
        deltas[target.path] = dense(target.path, base, partial(_transformed, *S))
    return deltas


def _transformed(spectrum: Tensor, places: Tensor, m: int, n: int) -> Change:
    """W + Re(F_m* S F_n*) / (m n), for an S [m, n] that is the spectrum at its places.

    Along its rows, few of which hold anything, S is transformed at once; then down its columns in
    strips, so that no complex [m, n] is ever held.
    """
    places = places.to(spectrum.device)
    unique: Any = torch.unique  # without types in torch
    rows, which = unique(places // n, return_inverse=True)
    S = spectrum.new_zeros(len(rows), n)
    S[which, places % n] = spectrum
    across = torch.fft.ifft(S)
    update = spectrum.new_empty(m, n)
    for start in range(0, n, _STRIP):
        strip = across[:, start : start + _STRIP]
        column = strip.new_zeros(m, strip.shape[1])
        column[rows] = strip
        update[:, start : start + _STRIP] = torch.fft.ifft(column, dim=0).real
    return added_whole(update)
