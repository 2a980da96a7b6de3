"""What a loaded library knows of the processor: strike AVX-512 from it.

`__builtin_cpu_supports` of gcc looks into a copy of cpuid's answer that each library keeps for
itself, `__cpu_model` and `__cpu_features2` of libgcc, written as the library is loaded. No variable
of the environment changes it. bitsandbytes goes by it, and asks it once, as it is imported: so its
library is loaded before that, and what is struck then it takes for a processor without.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARY = "libbitsandbytes_cpu.so"
SAY = ("has_avx512f_cpu", "has_avx512bf16_cpu")  # functions of it that answer from the copy
_MODEL, _FURTHER = "__cpu_model", "__cpu_features2"  # the words of bits 0 to 31, and from 32 on
_BITS_AT = 12  # bytes of __cpu_model before its word: vendor, type, subtype
# AVX512F, VL, BW, DQ, CD, ER, PF, VBMI, IFMA, 4VNNIW, 4FMAPS, VPOPCNTDQ, VBMI2; VNNI, BITALG, BF16,
# VP2INTERSECT: libgcc's numbers, which are fixed since old objects read what new ones wrote.
_AVX512 = sum(1 << bit for bit in (15, *range(20, 32), *range(34, 38)))
_SYMBOLS = 2  # SHT_SYMTAB


class StillThere(Exception):
    """The library goes on taking this for a processor with AVX-512."""


def hold_bitsandbytes() -> None:
    """In this process bitsandbytes takes the loops of a CPU without AVX-512. Raises StillThere."""
    assert "bitsandbytes" not in sys.modules, "it has asked already"
    found = find_spec("bitsandbytes")
    assert found is not None
    assert found.submodule_search_locations
    strike_avx512(Path(found.submodule_search_locations[0]) / LIBRARY)
    from bitsandbytes.cextension import lib  # where there is a GPU it may be another library

    if said := [name for name in SAY if not _denies(lib, name)]:
        raise StillThere(f"bitsandbytes cannot be held to avx2: its {', '.join(said)} says yes")


def strike_avx512(path: Path) -> ctypes.CDLL:
    """Load a library and strike AVX-512 from its copy, where its table of symbols tells of one."""
    library = ctypes.CDLL(str(path))
    values = _symbols(path.read_bytes(), {_MODEL, _FURTHER, SAY[0]})
    if SAY[0] in values:
        at = ctypes.cast(library[SAY[0]], ctypes.c_void_p).value
        assert at is not None
        for symbol, offset, bits in ((_MODEL, _BITS_AT, _AVX512), (_FURTHER, 0, _AVX512 >> 32)):
            if symbol in values:
                word = ctypes.c_uint32.from_address(at - values[SAY[0]] + values[symbol] + offset)
                word.value &= ~bits
    return library


def _denies(library: Any, name: str) -> bool:
    """No library, or one without the function, has no such loops."""
    try:
        return not getattr(library, name)() & 1
    except (AttributeError, RuntimeError):  # bitsandbytes' stand-in for a library raises this
        return True


def _symbols(elf: bytes, wanted: set[str]) -> dict[str, int]:
    """Values of symbols by name, of an ELF of 64 bits; of anything else none."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return {}
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # name, type, flags, address, offset, size, link, …
    sections = [struct.unpack_from("<IIQQQQI", elf, table + i * size) for i in range(count)]
    found = {}
    for _, kind, _, _, offset, length, link in sections:
        if kind != _SYMBOLS:
            continue
        names = sections[link][4]
        for at in range(offset, offset + length, 24):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
            start = names + name
            text = elf[start : elf.index(b"\0", start)].decode()
            if text in wanted:
                found[text] = value
    return found
