"""torch's largest library, linked by a thread while Python imports other things."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

LIBRARY = "libtorch_cpu.so"  # no Python in it, so it may be linked without the interpreter's lock


def preload_torch() -> None:
    """Begin, and return at once. A later `import torch` finds the library in memory, which saves it
    0.3 s; where anything is different here, it loads the library itself as ever."""
    library = torch_library(LIBRARY)
    if library is not None:
        threading.Thread(target=_link, args=(library,), name="nibble-preload", daemon=True).start()


def torch_library(name: str) -> Path | None:
    """One of torch's shared libraries, found without importing torch; None where it has none."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "lib" / name
    return library if library.exists() else None


def _link(library: Path) -> None:
    """By the C library's own dlopen: unlike ctypes.CDLL, calling it lets other threads run."""
    with suppress(OSError, AttributeError):
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes = (ctypes.c_char_p, ctypes.c_int)
        dlopen.restype = ctypes.c_void_p
        dlopen(os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL)
