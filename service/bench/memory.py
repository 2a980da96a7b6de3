"""Memory: what the kernel says this process holds (Linux), and what of it is the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from base.dense import RoundedEmbedding, RoundedLinear
from base.load import Base
from base.nf4 import NF4Linear


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `anonymous` is the process's own, the rest of `rss` is files mapped into it."""

    rss: int
    anonymous: int
    peak_rss: int


def resident(process: int | str = "self") -> Memory:
    """Of this process or of the one with a number, now. Raises OSError where there is no /proc."""
    rollup = _fields(Path(f"/proc/{process}/smaps_rollup"))
    status = _fields(Path(f"/proc/{process}/status"))
    return Memory(rss=rollup["Rss"], anonymous=rollup["Anonymous"], peak_rss=status["VmHWM"])


def quantised_bytes(base: Base) -> int:
    """Bytes of all NF4 weights of the base."""
    linears = [m for m in base.model.modules() if isinstance(m, NF4Linear)]
    return sum(m.weight.nbytes for m in linears if not isinstance(m, RoundedLinear))


def embedding_bytes(base: Base) -> int:
    """Bytes of the embedding table and the output head, of a shared one once."""
    weights = [p for p in base.model.parameters() if p.dim() == 2]
    rounded = (m for m in base.model.modules() if isinstance(m, RoundedLinear | RoundedEmbedding))
    weights += [tensor for m in rounded for tensor in m.weight.tensors().values()]
    return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def head_bytes(base: Base) -> int:
    """Bytes of the output head, which every step reads whole."""
    head = base.model.get_output_embeddings()
    return int(head.weight.nbytes)


def _fields(path: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of one file of /proc, in bytes."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found
