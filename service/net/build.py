"""Compile csrc/ into the library beside it. By hand: `python -m service.net.build`."""

from __future__ import annotations

import sys
from pathlib import Path

from base.kernels.build import build_library
from service.net.library import LIBRARY, REASON

HERE = Path(__file__).parent


def build(out_dir: Path | None = None) -> Path | None:
    """As `base.kernels.build` says; installing the package does this."""
    return build_library((out_dir or HERE) / LIBRARY, HERE / "csrc")


if __name__ == "__main__":
    built = build()
    if built is None:
        sys.exit((HERE / REASON).read_text().strip())
    print(built)
