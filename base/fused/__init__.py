"""transformers' decoders with what stands between their products in C, and no Python to speak of.

`fuse` swaps, in a loaded model of a known class on the CPU, its norms, attention and MLP modules,
decoder layers and the loop over them. Each module keeps its path, its children and transformers'
own way to call it, so wrappers and hooks go where they went before. Whatever class is not known
stays transformers' own; theirs is also the oracle of ours.
"""

from __future__ import annotations

from .decoder import Decoder, can_fuse, fuse
from .family import family_of
from .step import Adapters, Step

__all__ = ["Adapters", "Decoder", "Step", "can_fuse", "family_of", "fuse"]
