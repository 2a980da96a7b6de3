"""How large the blocks are that OFT cuts a layer's input into: PEFT's rules. No torch here."""

from __future__ import annotations


def oft_block_size(width: int, r: int, size: int) -> int:
    """The size that PEFT takes for a layer of this width: of `r` and `size`, one is 0.

    What does not divide the width gives way to the nearest divisor, the lower one of two
    (`OFTLayer.adjust_oft_parameters`).
    """
    return _divisor(width, size) if r == 0 else width // _divisor(width, r)


def _divisor(width: int, wanted: int) -> int:
    if wanted >= width:
        return width
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher
