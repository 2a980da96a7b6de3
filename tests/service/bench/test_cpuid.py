from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.bench import cpuid

# What a process says of bitsandbytes' library, and the CRC of a few weights that it decoded.
_CHILD = """
import ctypes, sys, zlib
from service.bench.cpuid import SAY, hold_bitsandbytes
if sys.argv[1] == "held":
    hold_bitsandbytes()
import torch
from bitsandbytes.cextension import lib
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
torch.manual_seed(0)
made = dequantize_4bit(*quantize_4bit(torch.randn(64, 128), quant_type="nf4"))
print([getattr(lib, name)() & 1 for name in SAY], zlib.crc32(made.numpy().tobytes()))
"""


def _says(how: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, how], capture_output=True, text=True, check=True
    )
    return done.stdout.strip().rsplit(" ", 1)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is x86's")
def test_bitsandbytes_denies_avx512_and_decodes_to_the_same_bits() -> None:
    held, free = _says("held"), _says("free")
    assert held[0] == "[0, 0]"
    assert held[1] == free[1]
    if "avx512f" in Path("/proc/cpuinfo").read_text():
        assert free[0].startswith("[1,")


SOURCE = """
int __builtin_cpu_supports(const char *);
int has_avx512f_cpu(void) { return __builtin_cpu_supports("avx512f") != 0; }
int has_avx512bf16_cpu(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
int has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }
int has_fma(void) { return __builtin_cpu_supports("fma") != 0; }
int has_aes(void) { return __builtin_cpu_supports("aes") != 0; }
int has_gfni(void) { return __builtin_cpu_supports("gfni") != 0; }
int has_vnni(void) { return __builtin_cpu_supports("avx512vnni") != 0; }
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is x86's")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_only_avx512_is_struck(tmp_path: Path) -> None:
    def made(name: str, *flags: str) -> Path:
        (tmp_path / "one.c").write_text(SOURCE)
        path = tmp_path / name
        command = ["cc", "-shared", "-fPIC", "-O1", *flags, str(tmp_path / "one.c"), "-o"]
        subprocess.run([*command, str(path)], check=True)
        return path

    free, held = ctypes.CDLL(str(made("free.so"))), cpuid.strike_avx512(made("held.so"))
    names = ("has_avx2", "has_fma", "has_aes", "has_gfni")
    assert [held[name]() for name in names] == [free[name]() for name in names]
    assert [held[name]() for name in (*cpuid.SAY, "has_vnni")] == [0, 0, 0]
    bare = cpuid.strike_avx512(made("bare.so", "-s"))  # no table of symbols: it stays as it was
    assert bare[cpuid.SAY[0]]() == free[cpuid.SAY[0]]()


class _Asked:
    def __init__(self, answer: int) -> None:
        self.has_avx512f_cpu = lambda: answer


@pytest.mark.parametrize(("library", "denies"), [(_Asked(0), True), (_Asked(1), False)])
def test_a_library_is_asked_whether_it_is_held(library: object, denies: bool) -> None:
    assert cpuid._denies(library, cpuid.SAY[0]) == denies
    assert cpuid._denies(library, cpuid.SAY[1])  # it has no such function


def test_what_is_no_elf_has_no_symbols() -> None:
    assert cpuid._symbols(b"MZ" + bytes(99), {"__cpu_model"}) == {}
