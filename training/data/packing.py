"""Short examples laid end to end in one row, kept apart by their positions.

Where the position ids of a row start again, transformers' masks let no token look back over that
place, as long as it is given no attention mask (`masking_utils.find_packed_sequence_indices`).
That rests on the model handing its position ids to the mask, so it is tried, not believed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from training.errors import ConfigError

_FIRST, _OTHER, _SECOND = (5, 7, 9), (6, 8, 3), (4, 9, 5, 6)


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices into `lengths`, in rows of at most `capacity`: the longest first, each where it
    leaves least room. One that is longer than `capacity` has a row of its own."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, which row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[index], -1))
        left, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


@torch.no_grad()
def refuse_if_mixed(model: Any, device: torch.device, virtual_tokens: int = 0) -> None:
    """Raises ConfigError where examples packed into one row would see each other."""
    if virtual_tokens:
        raise ConfigError(
            "data.packing: the method's virtual tokens stand before a row, and every example "
            "needs them; data.packing=false is right"
        )
    positions = torch.tensor([[*range(len(_FIRST)), *range(len(_SECOND))]], device=device)
    packed = []
    for first in (_FIRST, _OTHER):
        tokens = torch.tensor([[*first, *_SECOND]], device=device)
        out = model(input_ids=tokens, position_ids=positions, use_cache=False)
        packed.append(out.logits[0, len(_FIRST) :].float())
    alone = model(input_ids=torch.tensor([_SECOND], device=device), use_cache=False)
    wide = float(alone.logits.float().abs().max())
    # Beside another first example nothing may change; alone, only the order of some additions.
    apart = torch.allclose(packed[0], packed[1], rtol=0, atol=1e-5 * wide)
    if not apart or not torch.allclose(
        packed[0], alone.logits[0].float(), rtol=0, atol=(1e-3 if _exact(model) else 5e-2) * wide
    ):
        raise ConfigError(
            "data.packing: this base's attention does not keep packed examples apart; "
            "data.packing=false is right"
        )


def _exact(model: Any) -> bool:
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype == torch.float32
