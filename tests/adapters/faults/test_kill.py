"""Killed in the middle of an upload, then started again."""

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapters.store import AdapterStore
from adapters.validation_child import ROOT, _spec_fields
from base.spec import BaseSpec
from tests.adapters.conftest import Saver

UPLOADER = Path(__file__).with_name("uploader.py")
STEPS = ["created", "written", "synced", "renamed", "directory synced", "committed"]


@pytest.fixture
def work(tmp_path: Path, spec: BaseSpec, save: Saver) -> Path:
    """What the uploader reads."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "spec.json").write_text(json.dumps(_spec_fields(spec)))
    for seed in range(3):
        saved = save(targets=["q_proj"], seed=seed)
        (work / "adapter_config.json").write_bytes(saved.config)
        (work / f"weights-{seed}.safetensors").write_bytes(saved.weights.read_bytes())
    return work


def command(store: Path, work: Path, *fault: str) -> list[str]:
    return [sys.executable, "-I", str(UPLOADER), str(ROOT), str(store), str(work), *fault]


def check_after(store: Path, acknowledged: list[str]) -> AdapterStore:
    """Start again: what was acknowledged is there and whole, the rest is swept away."""
    opened = AdapterStore(str(store), str(store / "catalog.db"))
    report = opened.sweep(older_than=float("inf"))
    assert report.missing == ()
    for line in acknowledged:
        name, digest = line.split()
        manifest = opened.resolve(name)
        assert manifest.digest == digest
        assert opened.weights_path(manifest).stat().st_size == manifest.weights_bytes
    visible = opened.list()
    # One more than was acknowledged may be there: killed between the row and the reply.
    assert len(acknowledged) <= len(visible) <= len(acknowledged) + 1
    for manifest in visible:
        opened.weights_path(manifest)
    assert list((store / "tmp").iterdir()) == []
    blobs = {path.name for path in (store / "blobs").glob("*/*")}
    assert blobs == {manifest.weights_sha256 for manifest in visible}
    return opened


@pytest.mark.parametrize("step", STEPS)
def test_killed_after_each_step(tmp_path: Path, work: Path, step: str) -> None:
    store, upload = tmp_path / "store", 2
    done = subprocess.run(
        command(store, work, step, str(upload)), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = done.stdout.splitlines()
    assert len(acknowledged) == upload - 1
    opened = check_after(store, acknowledged)
    assert len(opened.list()) == upload - (step != "committed")
    opened.close()


def test_killed_at_random_moments(tmp_path: Path, work: Path) -> None:
    """The same store, killed again and again: it only ever grows by whole adapters."""
    store, chance = tmp_path / "store", random.Random(7)
    store.mkdir()
    for life in range(4):
        process = subprocess.Popen(command(store, work), stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(chance.uniform(0.6, 2.5), process.kill)
        timer.start()
        acknowledged = (process.communicate()[0] or "").splitlines()
        timer.cancel()
        assert process.returncode == -signal.SIGKILL, f"life {life} ended by itself"
        opened = AdapterStore(str(store), str(store / "catalog.db"))
        report = opened.sweep(older_than=float("inf"))
        assert report.missing == ()
        for line in acknowledged:
            name, digest = line.split()
            assert opened.resolve(name).digest == digest
        for manifest in opened.list():
            opened.weights_path(manifest)
        assert list((store / "tmp").iterdir()) == []
        opened.close()
