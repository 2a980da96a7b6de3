"""An upload, killed or failing at each call to the disk, or cut by a power loss: what was
acknowledged is there and whole, the rest is not there at all.

The slow forms take every call; `docs/RELIABILITY.md` has their figures.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.validation_child import _spec_fields
from base.load import load_base
from tests.oracle import make_adapter, make_base

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("cc")

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="faults.c needs a C compiler, and Linux"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    assert COMPILER is not None
    source = str(HERE / "faults.c")
    options = ("-O1", "-shared", "-fPIC", "-o", str(target), source, "-ldl")
    subprocess.run([COMPILER, *options], check=True)
    return target


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the uploads read."""
    home = tmp_path_factory.mktemp("uploads")
    base = make_base(home / "base", "qwen3")
    spec = load_base(base, device="cpu", dtype="float32", cache_dir=home / "hashes").spec
    work = home / "work"
    work.mkdir()
    (work / "spec.json").write_text(json.dumps(_spec_fields(spec)))
    for seed in range(3):
        saved = make_adapter(home / f"{seed}", base, "lora", targets=["q_proj"], seed=seed)
        shutil.copy(saved / "adapter_config.json", work)
        weights = work / f"weights-{seed}.safetensors"
        shutil.copy(saved / "adapter_model.safetensors", weights)
    return work


def run(library: Path, work: Path, what: str, stride: int, seeds: int = 0) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "uploads.py"), str(ROOT), str(library), str(work)]
    done = subprocess.run(
        [*command, what, str(stride), str(seeds)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    print(what, {**found, "wrong": len(found["wrong"])})
    assert found["wrong"] == [], done.stderr[-4000:]
    return found


FORMS = [
    pytest.param("kills", 6, 0, 10),
    pytest.param("power", 9, 0, 20),
    pytest.param("fresh power", 40, 0, 10),
    pytest.param("failures", 5, 0, 15),
    pytest.param("kills", 1, 0, 60, marks=pytest.mark.slow),
    pytest.param("fresh kills", 1, 0, 100, marks=pytest.mark.slow),
    pytest.param("power", 1, 3, 200, marks=pytest.mark.slow),
    pytest.param("fresh power", 1, 1, 400, marks=pytest.mark.slow),
    pytest.param("failures", 1, 0, 80, marks=pytest.mark.slow),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("what", "stride", "seeds", "least"), FORMS)
def test_nothing_acknowledged_is_lost(
    library: Path, work: Path, what: str, stride: int, seeds: int, least: int
) -> None:
    assert run(library, work, what, stride, seeds)["tried"] >= least
