"""A process that uploads adapters one after another until it is killed.

usage: uploader.py ROOT STORE WORK [STEP COUNT]

WORK holds spec.json, adapter_config.json and weights-<n>.safetensors. Each acknowledged upload is
one line `name digest` on stdout, unbuffered. With STEP it kills itself with SIGKILL the COUNT-th
time the store has done that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path


def main() -> None:
    root, where, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    sys.path.insert(0, root)
    from adapters.limits import Limits
    from adapters.store import AdapterStore
    from adapters.validation_child import _spec

    wanted = sys.argv[4:5]
    remaining = int(sys.argv[5]) if wanted else 0

    def step(name: str) -> None:
        nonlocal remaining
        if [name] == wanted:
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    spec = _spec(json.loads((work / "spec.json").read_text()))
    config = (work / "adapter_config.json").read_bytes()
    weights = sorted(work.glob("weights-*"))
    store = AdapterStore(str(where), str(where / "catalog.db"), step=step)
    for number in count():
        source = weights[number % len(weights)]
        manifest = store.add(f"a{number}", config, source, None, spec, Limits())
        os.write(1, f"{manifest.name} {manifest.digest}\n".encode())


if __name__ == "__main__":
    main()
